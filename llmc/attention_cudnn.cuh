/*
The back end `cudnn` of attention: cuDNN's fused kernels, the fastest there are on Hopper.

The functions of attention_cudnn.cpp, which is compiled once and by the host compiler: it has no kernel of its own, and the
headers of cudnn-frontend take g++ ten seconds, nvcc a hundred. Shapes, layouts and what the functions compute are
attention.h's; here, what is particular to cuDNN.

Numbers         bf16. cuDNN has no fp32 attention
Reproducible    the same run twice gives the same bits, unless cudnn_attention_fast is set: then the backward pass adds up dq
                in whatever order the blocks finish
Memory          but for Blackwell, the reproducible backward pass holds 2 * T * T bytes a query head. It runs in pieces that
                keep to cudnn_attention_limit, or to the scratch there is where that is more; a T whose smallest piece, one kv head, takes four times as much is refused
Shapes          what cuDNN refuses, supports() says in words: another back end has to take it. T = 1 has no backward pass
*/
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#ifdef PRECISION_FP32
#error "cuDNN has no fp32 attention: build with USE_CUDNN=0, or with PRECISION=BF16"
#endif

// backward passes need not repeat bit for bit. Set before the scratch is sized
extern bool cudnn_attention_fast;

// bytes that the reproducible backward pass takes for what grows with T * T. Set before the scratch is sized
extern size_t cudnn_attention_limit;

// the version of the cuDNN library in use, as 10000 * major + 100 * minor + patch
size_t cudnn_attention_version(void);

// whether cuDNN takes this shape, for the forward pass and, when backward, that too. A shape's first question takes up to a
// second: its kernels are chosen and loaded
bool cudnn_attention_supports(AttentionShape shape, bool backward, Error* why);

// bytes of scratch for a forward pass or, when backward, for either pass. Of a shape that is supported, as below
size_t cudnn_attention_scratch(AttentionShape shape, bool backward);

// overwrites out (B*T, NH*HD) and lse (B, NH, T)
void cudnn_attention_forward(__nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv, AttentionShape shape,
                             void* scratch, cudaStream_t stream);

// overwrites dqkv, which has the layout of qkv. room: bytes of scratch; more than cudnn_attention_scratch makes it faster
void cudnn_attention_backward(__nv_bfloat16* dqkv, const __nv_bfloat16* dout, const __nv_bfloat16* qkv,
                              const __nv_bfloat16* out, const float* lse, AttentionShape shape, void* scratch, size_t room,
                              cudaStream_t stream);
