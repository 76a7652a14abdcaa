// In the place of CuPy's header of that name, which is the device's.
#pragma once
#include <complex>

using std::arg;
using std::complex;
using std::conj;
using std::imag;
using std::norm;
using std::real;
