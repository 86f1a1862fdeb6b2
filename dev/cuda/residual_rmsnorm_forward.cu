/*
Residual add, then RMSNorm forward: the stream takes what a block adds to it, and is normed for the next one.

    sum = a + b, rounded        r = 1 / sqrt(mean(sum^2) + eps)     y = w * sum * r         a b sum y (N, C)    w (C)   r (N)

Bytes           a, b in and sum, y out: 4*N*C numbers, and N floats. As two kernels, an add and a norm, it would be 5*N*C
Floor           H200, 4.30 TB/s for a copy; N 16384, bf16: C 2048 62 us, C 4096 125 us, C 8192 250 us, C 16384 500 us
The ideas are those of rmsnorm_forward.cu, which has the kernels of both.
*/
#define RMSNORM_RESIDUAL
#include "rmsnorm_forward.cu"
