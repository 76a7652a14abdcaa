// The functions of CUDA's runtime and driver that CuPy calls, on a machine without a device: memory is the host's, an order is
// carried out when it is given (or, while a stream is captured, when its graph is launched), and kernels are functions that g++ made.
//
// CuPy's modules hand their C functions to each other by name, in `__pyx_capi__`. `install(module)` puts these in their places,
// before another module has looked. Each has the signature of CuPy's own: its last argument says nothing here.
#include <Python.h>
#include <dlfcn.h>
#include <malloc.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

using Order = std::function<void()>;

struct Kernel {
    std::string name;
    void (*launch)(const unsigned* grid, const unsigned* block, void** arguments, bool meets);
    bool meets;                                 // whether its threads wait for each other
    std::vector<int> sizes, alignments;         // of its parameters
};
struct Module {
    void* compiled;
    std::string meeting;                        // "|name|name|" of the kernels whose threads wait
    std::map<std::string, Kernel*> kernels;
};
struct Graph { std::vector<Order> orders; };

static Graph* recording = nullptr;              // what a stream is asked for while it is captured
static intptr_t captured = 0;                   // that stream
static bool broken = false;                     // it was asked for what cannot be captured
static intptr_t next_handle = 0x1000;           // of streams and events; 1 and 2 are CUDA's own for the default streams
static long long waits = 0;                     // how often the host waited for the device, or would have

static PyObject* fail(const std::string& text)
{
    PyErr_SetString(PyExc_RuntimeError, text.c_str());
    return nullptr;
}
static PyObject* done() { Py_RETURN_NONE; }
static PyObject* wait(const char* what)
{
    ++waits;
    if (!recording) return done();
    broken = true;
    return fail(std::string("cudaErrorStreamCaptureUnsupported: ") + what + " while a stream is captured");
}
static void later_or_now(const Order& order)
{
    if (recording) recording->orders.push_back(order);
    else order();
}
extern "C" void hostcuda_later_or_now(void (*act)(void*), void* on) { later_or_now([=] { act(on); }); }
extern "C" intptr_t hostcuda_captured() { return recording ? captured : 0; }

// ---------------------------------------------------------------- memory
static const size_t WHOLE = size_t(8) << 30;
static size_t taken = 0;

static intptr_t out_of_memory()                 // as CuPy's own exception, whose pool then gives back what is free and asks again
{
    PyObject* module = PyImport_ImportModule("cupy_backends.cuda.api.runtime");
    PyObject* type = module ? PyObject_GetAttrString(module, "CUDARuntimeError") : nullptr;
    PyObject* error = type ? PyObject_CallFunction(type, "i", 2) : nullptr;             // cudaErrorMemoryAllocation
    if (error) PyErr_SetObject(type, error);
    Py_XDECREF(error);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return 0;
}
static intptr_t allocated(size_t size)
{
    void* memory = aligned_alloc(512, (size + 511) / 512 * 512);
    return memory ? (intptr_t)memory : out_of_memory();
}
static intptr_t take(size_t size, int)
{
    if (size > WHOLE - taken) return out_of_memory();
    intptr_t memory = allocated(size);
    if (memory) taken += malloc_usable_size((void*)memory);
    return memory;
}
static PyObject* give_back(intptr_t memory, int)
{
    taken -= malloc_usable_size((void*)memory);
    std::free((void*)memory);
    return done();
}
static PyObject* free_and_whole(int) { return Py_BuildValue("(nn)", Py_ssize_t(WHOLE - taken), Py_ssize_t(WHOLE)); }

// ---------------------------------------------------------------- the runtime
static int attribute(int which, int, int)
{
    switch (which) {                            // cudaDeviceAttr
    case 1: return 1024;                        // threads of a block
    case 16: return 132;                        // multiprocessors
    case 75: return 9;                          // compute capability 9.0
    case 76: return 0;
    default: return 1;
    }
}
// A warp of 512: CuPy's scan lets the threads of one wait for each other without the others, which the shim cannot; so all are one.
static PyObject* properties(int, int)
{
    return Py_BuildValue("{s:y,s:i,s:i,s:i,s:i,s:L}", "name", "no device", "warpSize", 512, "major", 9, "minor", 0,
                         "multiProcessorCount", 132, "totalGlobalMem", (long long)WHOLE);
}
static PyObject* copy(intptr_t to, intptr_t from, size_t size, int, int)
{
    if (recording) return wait("cudaMemcpy");
    ++waits;
    std::memcpy((void*)to, (void*)from, size);
    return done();
}
static PyObject* copy_async(intptr_t to, intptr_t from, size_t size, int kind, intptr_t, int)
{
    if (recording && kind != 3) return wait("a copy between host and device");      // 3: from device to device
    later_or_now([=] { std::memcpy((void*)to, (void*)from, size); });
    return done();
}
static PyObject* fill(intptr_t to, int value, size_t size, int)
{
    later_or_now([=] { std::memset((void*)to, value, size); });
    return done();
}
static PyObject* fill_async(intptr_t to, int value, size_t size, intptr_t, int) { return fill(to, value, size, 0); }
static PyObject* begin_capture(intptr_t stream, int, void*)
{
    if (!stream || recording) return fail("cudaErrorStreamCaptureUnsupported: the default stream, or another is captured");
    recording = new Graph;
    captured = stream;
    broken = false;
    return done();
}
static intptr_t end_capture(intptr_t stream, int)
{
    Graph* graph = recording;
    if (!graph || stream != captured) {
        fail("cudaErrorIllegalState: this stream is not captured");
        return 0;
    }
    recording = nullptr;
    if (!broken) return (intptr_t)graph;
    delete graph;
    fail("cudaErrorStreamCaptureInvalidated");
    return 0;
}
static PyObject* launch_graph(intptr_t graph, intptr_t, int)
{
    for (const Order& order : ((Graph*)graph)->orders) order();
    return done();
}

// ---------------------------------------------------------------- the driver
// What it is given as a compiled source is "path|name|name|": a shared object, and the kernels whose threads wait for each other.
static intptr_t load(PyObject* data, int)
{
    std::string text(PyBytes_AsString(data));
    size_t end = text.find('|');
    void* compiled = dlopen(text.substr(0, end).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!compiled) fail(dlerror());
    return compiled ? (intptr_t) new Module{compiled, text.substr(end), {}} : 0;
}
static intptr_t function_of(intptr_t handle, PyObject* name, int)
{
    Module* module = (Module*)handle;
    std::string text = PyUnicode_AsUTF8(name);
    Kernel*& kernel = module->kernels[text];
    if (kernel) return (intptr_t)kernel;
    auto find = [&](const char* prefix) { return dlsym(module->compiled, (prefix + text).c_str()); };
    auto sizes = (int (*)(int*))find("sizes_");
    auto alignments = (void (*)(int*))find("alignments_");
    if (!sizes) {
        fail("CUDA_ERROR_NOT_FOUND: " + text);
        return 0;
    }
    int numbers[256];
    kernel = new Kernel{text, (decltype(Kernel::launch))find("launch_"), module->meeting.find("|" + text + "|") != text.npos, {}, {}};
    int count = sizes(numbers);
    kernel->sizes.assign(numbers, numbers + count);
    alignments(numbers);
    kernel->alignments.assign(numbers, numbers + count);
    return (intptr_t)kernel;
}
static PyObject* launch(intptr_t handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                        intptr_t stream, intptr_t parameters, intptr_t, int)
{
    Kernel* kernel = (Kernel*)handle;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !(bx * by * bz) || bx * by * bz > 1024)
        return fail("CUDA_ERROR_INVALID_VALUE: " + kernel->name + " on a grid or block of a size that is not allowed");
    if (recording && stream != captured)
        return fail("cudaErrorStreamCaptureUnsupported: " + kernel->name + " on another stream than the captured one");
    // Arguments are copied when they are given, as a driver does, each to a place that suits any type.
    std::vector<std::vector<std::max_align_t>> arguments;
    for (size_t i = 0; i < kernel->sizes.size(); ++i) {
        const void* given = ((void**)parameters)[i];
        arguments.emplace_back((kernel->sizes[i] + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
        std::memcpy(arguments.back().data(), given, kernel->sizes[i]);
        if (kernel->alignments[i] > 1 && *(const intptr_t*)given % kernel->alignments[i])
            return fail("cudaErrorMisalignedAddress: " + kernel->name);
    }
    later_or_now([=]() mutable {
        std::vector<void*> pointers;
        for (auto& argument : arguments) pointers.push_back(argument.data());
        unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        kernel->launch(grid, block, pointers.data(), kernel->meets);
    });
    return done();
}

// ---------------------------------------------------------------- in CuPy's place
template <class F> static void* address(F* function) { return (void*)function; }

static const std::map<std::string, void*> FUNCTIONS = {
    {"_ensure_context", address(+[]() { return done(); })},
    {"driverGetVersion", address(+[](int) { return 13000; })},
    {"getDevice", address(+[](int) { return 0; })},
    {"getDeviceCount", address(+[](int) { return 1; })},
    {"setDevice", address(+[](int, int) { return done(); })},
    {"deviceGetAttribute", address(attribute)},
    {"getDeviceProperties", address(properties)},
    {"deviceSynchronize", address(+[](int) { return wait("cudaDeviceSynchronize"); })},
    {"malloc", address(take)},
    {"free", address(give_back)},
    {"hostAlloc", address(+[](size_t size, unsigned, int) { return allocated(size); })},
    {"freeHost", address(+[](intptr_t memory, int) { std::free((void*)memory); return done(); })},
    {"memGetInfo", address(free_and_whole)},
    {"pointerGetMemoryType", address(+[](intptr_t, int) { return 0; })},                    // of no kind that CUDA knows
    {"memcpy", address(copy)},
    {"memcpyAsync", address(copy_async)},
    {"memset", address(fill)},
    {"memsetAsync", address(fill_async)},
    {"eventCreate", address(+[](int) { return next_handle++; })},
    {"eventCreateWithFlags", address(+[](unsigned, int) { return next_handle++; })},
    {"eventDestroy", address(+[](intptr_t, int) { return done(); })},
    {"eventRecord", address(+[](intptr_t, intptr_t, int) { return done(); })},
    {"eventSynchronize", address(+[](intptr_t, int) { return wait("cudaEventSynchronize"); })},
    {"eventElapsedTime", address(+[](intptr_t, intptr_t, int) { return 1.0f; })},
    {"streamCreate", address(+[](int) { return next_handle++; })},
    {"streamCreateWithFlags", address(+[](unsigned, int) { return next_handle++; })},
    {"streamCreateWithPriority", address(+[](unsigned, int, int) { return next_handle++; })},
    {"streamDestroy", address(+[](intptr_t, int) { return done(); })},
    {"streamSynchronize", address(+[](intptr_t, int) { return wait("cudaStreamSynchronize"); })},
    {"streamWaitEvent", address(+[](intptr_t, intptr_t, int, void*) { return done(); })},
    {"streamIsCapturing", address(+[](intptr_t stream, int) { return int(recording && stream == captured); })},
    {"streamBeginCapture", address(begin_capture)},
    {"streamEndCapture", address(end_capture)},
    {"graphInstantiate", address(+[](intptr_t graph, int) { return graph; })},
    {"graphLaunch", address(launch_graph)},
    {"graphDestroy", address(+[](intptr_t, int) { return done(); })},
    {"graphExecDestroy", address(+[](intptr_t, int) { return done(); })},
    {"ctxGetCurrent", address(+[](int) { return (intptr_t)1; })},
    {"ctxSetCurrent", address(+[](intptr_t, int) { return done(); })},
    {"ctxGetDevice", address(+[](int) { return 0; })},
    {"moduleLoadData", address(load)},
    {"moduleUnload", address(+[](intptr_t, int) { return done(); })},
    {"moduleGetFunction", address(function_of)},
    {"funcGetAttribute", address(+[](int, intptr_t, int) { return 1024; })},
    {"launchKernel", address(launch)},
};

// install(module) -> [(name, signature, address)] of what was put in place.
static PyObject* install(PyObject*, PyObject* module)
{
    PyObject* capi = PyObject_GetAttrString(module, "__pyx_capi__");
    PyObject* found = capi ? PyList_New(0) : nullptr;
    for (auto& [name, function] : FUNCTIONS) {
        PyObject* theirs = found ? PyDict_GetItemString(capi, name.c_str()) : nullptr;
        if (!theirs) continue;
        const char* signature = strdup(PyCapsule_GetName(theirs));
        PyObject* ours = PyCapsule_New(function, signature, nullptr);
        PyObject* entry = Py_BuildValue("(ssn)", name.c_str(), signature, (Py_ssize_t)function);
        PyDict_SetItemString(capi, name.c_str(), ours);
        PyList_Append(found, entry);
        Py_DECREF(ours);
        Py_DECREF(entry);
    }
    Py_XDECREF(capi);
    return found;
}
static PyObject* count_waits(PyObject*, PyObject*) { return PyLong_FromLongLong(waits); }

static PyMethodDef methods[] = {{"install", install, METH_O, nullptr}, {"waits", count_waits, METH_NOARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "hostcuda_runtime", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_hostcuda_runtime() { return PyModule_Create(&definition); }
