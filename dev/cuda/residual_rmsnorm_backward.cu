/*
RMSNorm backward with the gradient of the residual stream added on the way: dx, the stream's gradient, takes what comes back
through the norm, in place.

    g = w * dy      dx += r * (g - x * r^2 * mean(g * x))   dw += sum over rows of dy * x * r     x dy dx (N, C)  w dw (C)  r (N)

Bytes           x, dy, dx in and dx out: 4*N*C numbers, and N floats. As two kernels, a norm and an add, it would be 6*N*C
Floor           H200, 4.30 TB/s for a copy; N 16384, bf16: C 2048 62 us, C 4096 125 us, C 8192 250 us, C 16384 500 us
The ideas are those of rmsnorm_backward.cu, which has the kernels of both.
*/
#define RMSNORM_RESIDUAL
#include "rmsnorm_backward.cu"
