// Max-pooling of (images, h, w, c), forward and backward.
//
// Padding counts as minus infinity, NaN beats everything; of equal pixels the first in row-major order wins, and gets all of the gradient.
#include "common.cuh"

extern "C" __global__ void max_pool2d(const stored* image, stored* best, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                                      int ph, int pw, int p, int q)
{
    EACH(e, images * p * q * c) {
        int channel = e % c, x0 = e / c % q * sw - pw, y0 = e / c / q % p * sh - ph, n = e / c / q / p;
        real most = 0;
        bool any = false;
        for (int y = max(y0, 0); y < min(y0 + kh, h); ++y)
            for (int x = max(x0, 0); x < min(x0 + kw, w); ++x) {
                real seen = image[((long long)(n * h + y) * w + x) * c + channel];
                if (!any || seen > most || (seen != seen && most == most)) most = seen;
                any = true;
            }
        best[e] = any ? most : -1 / real(0);
    }
}

// Whether (y, x) is the first pixel of its window that is its largest: none before it is.
__device__ bool is_first(const stored* image, int n, int y, int x, int y0, int x0, real best, int h, int w, int c, int channel,
                         int kw)
{
    for (int above = max(y0, 0); above <= y; ++above)
        for (int left = max(x0, 0); left < min(x0 + kw, w); ++left) {
            if (above == y && left == x) return true;
            real seen = image[((long long)(n * h + above) * w + left) * c + channel];
            if (seen == best || seen != seen) return false;
        }
    return true;
}

// Each pixel asks the windows that saw it whether it was their largest, and adds up the gradients of those that say so. No
// winner was written down: nearly all pixels see at once that they are not the largest, and only equals look further.
extern "C" __global__ void max_pool2d_grad(const stored* dy, const stored* image, const stored* best, stored* dx, int images, int h, int w,
                                           int c, int kh, int kw, int sh, int sw, int ph, int pw, int p, int q)
{
    EACH(e, images * h * w * c) {
        int channel = e % c, x = e / c % w, y = e / c / w % h, n = e / c / w / h;
        real mine = image[e], sum = 0;
        for (int i = max((y + ph - kh) / sh, 0); i * sh - ph <= y && i < p; ++i)
            for (int j = max((x + pw - kw) / sw, 0); j * sw - pw <= x && j < q; ++j) {
                int y0 = i * sh - ph, x0 = j * sw - pw;
                if (y0 + kh <= y || x0 + kw <= x) continue;
                long long window = ((long long)(n * p + i) * q + j) * c + channel;
                if ((mine == best[window] || mine != mine) && is_first(image, n, y, x, y0, x0, best[window], h, w, c, channel, kw))
                    sum += dy[window];
            }
        dx[e] = sum;
    }
}
