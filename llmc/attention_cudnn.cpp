/*
Attention by cuDNN, through cudnn-frontend: graphs are described, built once for each shape, kept, and executed.

Graph           cuDNN is told which tensors there are (sizes, strides, type) and which operation joins them; it chooses a
                kernel and says how much workspace that needs. q, k and v are described as they lie in the packed
                (B*T, (NH + 2*NKV) * HD), heads of k and v uncopied
Reproducible    dq is a sum over the keys, which many blocks have a part in. The fast backward pass adds the parts up in fp32
                as blocks finish. The reproducible one, but for Blackwell, writes ds (query heads, T, T) in bf16 and
                multiplies it by k afterwards
Pieces          one execution takes some whole sequences, or of one sequence some kv heads with their query heads: as many as
                keep ds within the room there is, or within cudnn_attention_limit when scratch is sized. Pieces are equal, so
                that all use one graph. Larger ones are faster: of 4 x 8192 tokens, 32/8 heads, a step of llama3.2-1B took
                618 ms with 1 GiB, 607 with 2, 592 with 4, 586 with 16 (H200), to the same bits
Ragged T        when T is no multiple of 128, the backward pass is told the lengths of the sequences as well: a tile's rows
                beyond the end are zeros, whose score is 0, and e^(0 - lse) overflows where lse is below -88; times zero,
                that is NaN. The causal mask hides such keys but not such queries; lengths hide both (seen by others:
                NVIDIA/cudnn-frontend issues 160 and 1072, pull request 628)
Numerics        bf16 in and out, fp32 sums; p and ds are rounded to bf16 before they are multiplied, dk and dv of each query
                head before they are summed over the group
Bound by        FLOPs, as attention.h counts them. Through PyTorch, on one H200: 435 to 584 TFLOP/s forward, 376 to 493
                backward when it need not be reproducible
Proved by       dev/test/gpu/test_attention_cudnn.cuh (against the CPU's; in pieces; two runs; lse below -88)
Source          docs.nvidia.com/deeplearning/cudnn/frontend, operation "Attention"
*/
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "attention.h"
#include "attention_cudnn.cuh"

#if CUDNN_FRONTEND_VERSION < 11300 || CUDNN_MAJOR < 9
#error "cudnn-frontend 1.13 or later and cuDNN 9 expected: pip install nvidia-cudnn-frontend nvidia-cudnn-cu13"
#endif

namespace fe = cudnn_frontend;
typedef std::shared_ptr<fe::graph::Tensor_attributes> CudnnTensor;
typedef std::unordered_map<int64_t, void*> CudnnPointers;

bool cudnn_attention_fast = false;
size_t cudnn_attention_limit = (size_t)1 << 30;

// a tensor's number, by which its address is given to an execution
typedef enum { ID_Q = 1, ID_K, ID_V, ID_OUT, ID_LSE, ID_DOUT, ID_DQ, ID_DK, ID_DV, ID_QUERIES, ID_KEYS } CudnnId;

// what one execution takes: sequences, and kv heads of each
typedef struct {
    int sequences, kv_heads;
} CudnnPiece;

// one pass over one shape; kept until the process ends
struct CudnnPass {
    AttentionShape shape;
    CudnnPiece piece;
    bool backward, fast;
    bool built; // whether cuDNN took it
    Error why;  // when not
    fe::graph::Graph graph;
    size_t bytes;     // of workspace
    int32_t* lengths; // (sequences) on the GPU, T each; NULL when T is whole tiles
};

// ---- graphs ----------------------------------------------------------------------------------

// NULL, with the reason, when there is no cuDNN to work with
static cudnnHandle_t cudnn_handle(Error* why) {
    static cudnnHandle_t handle = NULL;
    if (handle) return handle;
    const size_t version = cudnnGetVersion();
    cudnnStatus_t status;
    if (version < 90600) {
        set_error(why, "cuDNN %zu found, 9.6 (90600) or later expected", version);
    } else if ((status = cudnnCreate(&handle)) != CUDNN_STATUS_SUCCESS) {
        set_error(why, "cuDNN does not start: %s", cudnnGetErrorString(status));
        handle = NULL;
    }
    return handle;
}

// the largest divisor of n below x, which is above 1
static int cudnn_smaller(int x, int n) {
    while (n % --x) {}
    return x;
}

// bytes of ds for one kv head of one sequence; 0 when the pass has none
static int64_t cudnn_ds(AttentionShape s, bool backward, bool fast) {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    const int64_t T = s.T, queries = (T + 63) / 64 * 64, keys = (T + 127) / 128 * 128; // whole tiles
    return backward && !fast && major != 10 ? 2 * queries * keys * (s.NH / s.NKV) : 0;
}

// as much as keeps ds within `most` bytes, in equal pieces, one kv head at least; offsets within one stay below 2^31
static CudnnPiece cudnn_piece(AttentionShape s, int64_t ds, size_t most) {
    CudnnPiece p = { s.B, s.NKV };
    const int64_t sequence = (int64_t)s.T * (s.NH + 2 * s.NKV) * s.HD;
    auto fits = [&] {
        return p.sequences * sequence <= INT32_MAX && (size_t)(p.sequences * p.kv_heads * ds) <= most;
    };
    while (p.sequences > 1 && !fits()) p.sequences = cudnn_smaller(p.sequences, s.B);
    while (p.kv_heads > 1 && !fits()) p.kv_heads = cudnn_smaller(p.kv_heads, s.NKV);
    return p;
}

static fe::graph::Tensor_attributes cudnn_describe(CudnnId id, std::vector<int64_t> sizes, std::vector<int64_t> strides,
                                                   fe::DataType_t type) {
    return fe::graph::Tensor_attributes().set_uid(id).set_dim(sizes).set_stride(strides).set_data_type(type);
}

// `heads` heads side by side in rows that are ld numbers apart
static fe::graph::Tensor_attributes cudnn_heads(const CudnnPass* p, CudnnId id, int64_t heads, int64_t ld) {
    const int64_t T = p->shape.T, HD = p->shape.HD;
    return cudnn_describe(id, { p->piece.sequences, heads, T, HD }, { T * ld, HD, ld, 1 }, fe::DataType_t::BFLOAT16);
}

static void cudnn_output(const CudnnTensor& x, const fe::graph::Tensor_attributes& as) {
    x->set_output(true).set_uid(as.get_uid()).set_data_type(as.get_data_type());
    x->set_dim(as.get_dim()).set_stride(as.get_stride());
}

// tensors and the operation between them. An input is a tensor of the graph; an output is described once it exists
static void cudnn_describe_pass(CudnnPass* p) {
    fe::graph::Graph* g = &p->graph;
    const AttentionShape s = p->shape;
    const int64_t n = p->piece.sequences, kv = p->piece.kv_heads, heads = kv * (s.NH / s.NKV), T = s.T;
    const int64_t ld = (int64_t)(s.NH + 2 * s.NKV) * s.HD, ldo = (int64_t)s.NH * s.HD;
    const float scale = 1 / sqrtf((float)s.HD);
    g->set_io_data_type(fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT);
    g->set_compute_data_type(fe::DataType_t::FLOAT);

    CudnnTensor q = g->tensor(cudnn_heads(p, ID_Q, heads, ld));
    CudnnTensor k = g->tensor(cudnn_heads(p, ID_K, kv, ld)), v = g->tensor(cudnn_heads(p, ID_V, kv, ld));
    const auto lse = cudnn_describe(ID_LSE, { n, heads, T, 1 }, { heads * T, T, 1, 1 }, fe::DataType_t::FLOAT);
    const auto out = cudnn_heads(p, ID_OUT, heads, ldo);
    if (!p->backward) {
        auto causal = fe::graph::SDPA_attributes().set_name("attention").set_attn_scale(scale).set_generate_stats(true);
        if (T > 1) // one query and one key: a mask that hides nothing confuses the kernels for generation
            causal.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
        auto [o, stats] = g->sdpa(q, k, v, causal);
        cudnn_output(o, out);
        cudnn_output(stats, lse);
        return;
    }
    auto causal = fe::graph::SDPA_backward_attributes().set_name("attention_backward").set_attn_scale(scale);
    causal.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT).set_diagonal_band_right_bound(0);
    causal.set_deterministic_algorithm(!p->fast);
    if (p->lengths) {
        const auto int32 = fe::DataType_t::INT32;
        causal.set_padding_mask(true);
        causal.set_seq_len_q(g->tensor(cudnn_describe(ID_QUERIES, { n, 1, 1, 1 }, { 1, 1, 1, 1 }, int32)));
        causal.set_seq_len_kv(g->tensor(cudnn_describe(ID_KEYS, { n, 1, 1, 1 }, { 1, 1, 1, 1 }, int32)));
    }
    CudnnTensor o = g->tensor(out), dout = g->tensor(cudnn_heads(p, ID_DOUT, heads, ldo)), stats = g->tensor(lse);
    auto [dq, dk, dv] = g->sdpa_backward(q, k, v, o, dout, stats, causal);
    cudnn_output(dq, cudnn_heads(p, ID_DQ, heads, ld));
    cudnn_output(dk, cudnn_heads(p, ID_DK, kv, ld));
    cudnn_output(dv, cudnn_heads(p, ID_DV, kv, ld));
}

// (sequences) times T on the GPU
static bool cudnn_lengths(CudnnPass* p) {
    std::vector<int32_t> lengths(p->piece.sequences, p->shape.T);
    const size_t bytes = lengths.size() * sizeof(int32_t);
    cudaError_t code = cudaMalloc((void**)&p->lengths, bytes);
    if (code == cudaSuccess) code = cudaMemcpy(p->lengths, lengths.data(), bytes, cudaMemcpyHostToDevice);
    return code == cudaSuccess || set_error(&p->why, "%zu bytes of GPU memory: %s", bytes, cudaGetErrorString(code));
}

// false, with the reason, when cuDNN has no kernel for it
static bool cudnn_build(CudnnPass* p) {
    const AttentionShape s = p->shape;
    if (s.HD % 8) return set_error(&p->why, "head_dim is %d, cuDNN's attention needs a multiple of 8", s.HD);
    if (p->backward && s.T < 2) return set_error(&p->why, "T is %d, cuDNN's backward pass needs 2 or more", s.T);
    const double ds = (double)cudnn_ds(s, p->backward, p->fast);
    if (ds > 4. * cudnn_attention_limit)
        return set_error(&p->why, "T is %d, for which cuDNN's reproducible backward pass takes %.1f GiB a kv head", s.T,
                         ds / 0x1p30);
    cudnnHandle_t handle = cudnn_handle(&p->why);
    if (!handle || (p->backward && s.T % 128 && !cudnn_lengths(p))) return false;
    int64_t bytes = 0;
    std::string reason;
    try { // most of what goes wrong comes back as a value, some of it is thrown
        cudnn_describe_pass(p);
        fe::error_t error = p->graph.build(handle, { fe::HeurMode_t::A });
        if (error.is_good()) error = p->graph.get_workspace_size(bytes);
        if (error.is_bad()) reason = error.get_message();
    } catch (const std::exception& e) { reason = e.what(); }
    p->bytes = (size_t)bytes;
    const char* pass = !p->backward ? "forward" : p->fast ? "backward" : "deterministic backward";
    return reason.empty() || set_error(&p->why, "cuDNN %zu, %s pass, T %d, heads %d/%d, head_dim %d: %s",
                                       cudnnGetVersion(), pass, s.T, s.NH, s.NKV, s.HD, reason.c_str());
}

// the pass over a shape in pieces of `most` bytes of ds, built when it is first asked for; never NULL
static CudnnPass* cudnn_pass(AttentionShape s, bool backward, size_t most) {
    // not freed: when static objects are destroyed, the CUDA driver may already be gone
    static std::vector<CudnnPass*>* passes = new std::vector<CudnnPass*>;
    const bool fast = backward && cudnn_attention_fast;
    const CudnnPiece piece = cudnn_piece(s, cudnn_ds(s, backward, fast), most);
    for (CudnnPass* p : *passes)
        if (memcmp(&p->shape, &s, sizeof s) == 0 && memcmp(&p->piece, &piece, sizeof piece) == 0 &&
            p->backward == backward && p->fast == fast)
            return p;
    CudnnPass* p = new CudnnPass();
    p->shape = s, p->piece = piece, p->backward = backward, p->fast = fast;
    p->built = cudnn_build(p);
    passes->push_back(p);
    return p;
}

// ---- what attention.h calls ------------------------------------------------------------------

size_t cudnn_attention_version(void) { return cudnnGetVersion(); }

bool cudnn_attention_supports(AttentionShape shape, bool backward, Error* why) {
    CudnnPass* p = cudnn_pass(shape, false, cudnn_attention_limit);
    if (p->built && backward) p = cudnn_pass(shape, true, cudnn_attention_limit);
    if (!p->built) *why = p->why;
    return p->built;
}

static CudnnPass* cudnn_built_pass(AttentionShape shape, bool backward) {
    CudnnPass* p = cudnn_pass(shape, backward, cudnn_attention_limit);
    if (!p->built) die("%s", p->why.text);
    return p;
}

// the backward pass in the largest pieces for which `room` bytes of scratch are enough
static CudnnPass* cudnn_roomy_pass(AttentionShape shape, size_t room) {
    CudnnPass* p = cudnn_pass(shape, true, room);
    return p->built && p->bytes <= room ? p : cudnn_built_pass(shape, true);
}

size_t cudnn_attention_scratch(AttentionShape shape, bool backward) {
    size_t bytes = cudnn_built_pass(shape, false)->bytes;
    if (backward && cudnn_built_pass(shape, true)->bytes > bytes) bytes = cudnn_built_pass(shape, true)->bytes;
    return bytes;
}

static void cudnn_execute(CudnnPass* p, CudnnPointers& pointers, void* scratch, cudaStream_t stream) {
    Error why;
    cudnnHandle_t handle = cudnn_handle(&why); // there is one, or there were no pass
    cudnnStatus_t status = cudnnSetStream(handle, stream);
    if (status != CUDNN_STATUS_SUCCESS) die("cudnnSetStream: %s", cudnnGetErrorString(status));
    fe::error_t error = p->graph.execute(handle, pointers, scratch);
    if (error.is_bad()) die("cuDNN's attention does not run: %s", error.get_message().c_str());
#ifdef GPU_SYNC
    cudaError_t code = cudaStreamSynchronize(stream);
    if (code != cudaSuccess) die("cuDNN's attention: %s", cudaGetErrorString(code));
#endif
}

// calls run(row, head, kv_head) for each piece: its first row of B*T and its first query and kv head
template <typename Run>
static void cudnn_each_piece(const CudnnPass* p, Run run) {
    const int G = p->shape.NH / p->shape.NKV;
    for (int b = 0; b < p->shape.B; b += p->piece.sequences)
        for (int h = 0; h < p->shape.NKV; h += p->piece.kv_heads) run((size_t)b * p->shape.T, (size_t)h * G, (size_t)h);
}

void cudnn_attention_forward(__nv_bfloat16* out, float* lse, const __nv_bfloat16* qkv, AttentionShape s, void* scratch,
                             cudaStream_t stream) {
    CudnnPass* p = cudnn_built_pass(s, false);
    const size_t NH = s.NH, NKV = s.NKV, HD = s.HD, ld = (NH + 2 * NKV) * HD;
    cudnn_each_piece(p, [&](size_t row, size_t head, size_t kv_head) {
        __nv_bfloat16* x = (__nv_bfloat16*)qkv + row * ld; // cuDNN takes inputs as void* too
        CudnnPointers pointers = { { ID_Q, x + head * HD },
                                   { ID_K, x + (NH + kv_head) * HD },
                                   { ID_V, x + (NH + NKV + kv_head) * HD },
                                   { ID_OUT, out + (row * NH + head) * HD },
                                   { ID_LSE, lse + row * NH + head * s.T } };
        cudnn_execute(p, pointers, scratch, stream);
    });
}

void cudnn_attention_backward(__nv_bfloat16* dqkv, const __nv_bfloat16* dout, const __nv_bfloat16* qkv,
                              const __nv_bfloat16* out, const float* lse, AttentionShape s, void* scratch, size_t room,
                              cudaStream_t stream) {
    CudnnPass* p = cudnn_roomy_pass(s, room);
    const size_t NH = s.NH, NKV = s.NKV, HD = s.HD, ld = (NH + 2 * NKV) * HD;
    cudnn_each_piece(p, [&](size_t row, size_t head, size_t kv_head) {
        __nv_bfloat16 *x = (__nv_bfloat16*)qkv + row * ld, *dx = dqkv + row * ld;
        CudnnPointers pointers = { { ID_Q, x + head * HD },
                                   { ID_K, x + (NH + kv_head) * HD },
                                   { ID_V, x + (NH + NKV + kv_head) * HD },
                                   { ID_OUT, (void*)(out + (row * NH + head) * HD) },
                                   { ID_LSE, (void*)(lse + row * NH + head * s.T) },
                                   { ID_DOUT, (void*)(dout + (row * NH + head) * HD) },
                                   { ID_DQ, dx + head * HD },
                                   { ID_DK, dx + (NH + kv_head) * HD },
                                   { ID_DV, dx + (NH + NKV + kv_head) * HD } };
        if (p->lengths) pointers[ID_QUERIES] = pointers[ID_KEYS] = p->lengths;
        cudnn_execute(p, pointers, scratch, stream);
    });
}
