// The module's functions: torch tensors in, checked, and handed to the kernels as pointers. The long ones release the GIL.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <Python.h>
#include <sys/mman.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"

namespace baton {

int num_threads() { return at::get_num_threads(); }

void run_on_torch(int64_t tasks, TaskBody body, void* context) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, i);
    });
}

namespace {

using at::Tensor;

// Reads a METH_FASTCALL's arguments one after the other.
class Arguments {
  public:
    Arguments(PyObject* const* args, Py_ssize_t count) : args_(args), count_(count) {}
    const Tensor& tensor() {
        PyObject* o = next();
        TORCH_CHECK(THPVariable_Check(o), "argument ", at_, " must be a tensor");
        const Tensor& t = THPVariable_Unpack(o);
        TORCH_CHECK(t.device().is_cpu(), "argument ", at_, " must be on the CPU");
        return t;
    }
    std::optional<Tensor> maybe() {
        TORCH_CHECK(at_ < count_, "too few arguments");
        if (args_[at_] == Py_None) return at_++, std::nullopt;
        return tensor();
    }
    int64_t integer() {
        const int64_t x = PyLong_AsLongLong(next());
        TORCH_CHECK(!PyErr_Occurred(), "argument ", at_, " must be an integer");
        return x;
    }
    float number() {
        const double x = PyFloat_AsDouble(next());
        TORCH_CHECK(!PyErr_Occurred(), "argument ", at_, " must be a number");
        return float(x);
    }

    PyObject* object() { return next(); }
    bool left() const { return at_ < count_; }

  private:
    PyObject* next() {
        TORCH_CHECK(at_ < count_, "too few arguments");
        return args_[at_++];
    }
    PyObject* const* args_;
    Py_ssize_t count_, at_ = 0;
};

struct NoGil {
    PyThreadState* state = PyEval_SaveThread();
    ~NoGil() { PyEval_RestoreThread(state); }
};

using Function = PyObject* (*)(Arguments&);

template <Function F>
PyObject* guarded(PyObject*, PyObject* const* args, Py_ssize_t count) {
    try {
        Arguments arguments(args, count);
        return F(arguments);
    } catch (const c10::Error& e) {
        PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const std::exception& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
}

bool is_bf16(const Tensor& t) {
    TORCH_CHECK(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, "bfloat16 or float32, not ", t.scalar_type());
    return t.scalar_type() == at::kBFloat16;
}

void check_rows(const Tensor& t, const char* what) {
    TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) == 1), what, " must be two-dimensional with contiguous rows");
}

void check_vector(const std::optional<Tensor>& t, int64_t size, at::ScalarType dtype, const char* what) {
    if (t) TORCH_CHECK(t->numel() == size && t->is_contiguous() && t->scalar_type() == dtype, what, " must be contiguous, ", size, " of ", dtype);
}

const void* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Packed weights of a model share large pieces of memory on huge pages: fewer TLB misses while they stream.
Tensor weight_memory(int64_t bytes, at::ScalarType dtype) {
    struct Piece {
        char* data;
        int64_t size, used = 0;
        explicit Piece(int64_t n) : data((char*)std::aligned_alloc(2 << 20, n)), size(n) {
            TORCH_CHECK(data, "out of memory");
            madvise(data, n, MADV_HUGEPAGE);
        }
        ~Piece() { std::free(data); }
    };
    static std::shared_ptr<Piece> current;  // guarded by the GIL
    const int64_t huge = 2 << 20, most = 32 * huge, need = (bytes + 4095) / 4096 * 4096;
    if (!current || current->size - current->used < need) {
        const int64_t size = std::max(most, (need + huge - 1) / huge * huge);
        current = std::make_shared<Piece>(size);
    }
    std::shared_ptr<Piece> piece = current;
    char* data = piece->data + piece->used;
    piece->used += need;
    return at::from_blob(data, {bytes / int64_t(c10::elementSize(dtype))}, [piece](void*) {}, at::TensorOptions().dtype(dtype));
}

int64_t packed_size(int64_t n, int64_t k, bool bf16, bool gated = false) {
    return num_panels(n, gated) * kPanel * ceil_div(k, bf16 ? 2 : 1) * (bf16 ? 2 : 1);
}

PyObject* pack(Arguments& a) {  // weight [n, k], gated (0 | 1) → [packed_size]
    const Tensor& w = a.tensor();
    const bool gated = a.integer() != 0;
    TORCH_CHECK(!gated || w.size(0) % 2 == 0, "gate and up must be of one size");
    check_rows(w, "weight");
    const bool bf16 = is_bf16(w);
    Tensor packed = weight_memory(packed_size(w.size(0), w.size(1), bf16, gated) * w.element_size(), w.scalar_type());
    {
        NoGil unlocked;
        pack_weight(w.const_data_ptr(), w.stride(0), w.size(0), w.size(1), gated, packed.data_ptr(), bf16);
    }
    return THPVariable_Wrap(std::move(packed));
}

PyObject* linear(Arguments& a) {  // x [m, k], packed, n, gated (0 | 1), bias [n] | None → [m, n], or [m, n / 2]
    const Tensor &x = a.tensor(), &w = a.tensor();
    const int64_t n = a.integer();
    const bool gated = a.integer() != 0;
    const std::optional<Tensor> bias = a.maybe();
    check_rows(x, "x");
    const bool bf16 = is_bf16(x);
    TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.numel() == packed_size(n, x.size(1), bf16, gated), "x and the packed weight do not fit");
    check_vector(bias, n, x.scalar_type(), "bias");
    const int64_t width = gated ? n / 2 : n;
    Tensor out = at::empty({x.size(0), width}, x.options());
    if (out.numel() == 0) return THPVariable_Wrap(std::move(out));
    {
        NoGil unlocked;
        baton::linear({x.const_data_ptr(), w.const_data_ptr(), data_or_null(bias), out.data_ptr(), x.size(0), n, x.size(1), x.stride(0), width, bf16,
                       gated});
    }
    return THPVariable_Wrap(std::move(out));
}

PyObject* gather(Arguments& a) {  // packed, n, k, ids [count] int64 → [count, k]
    const Tensor& w = a.tensor();
    const int64_t n = a.integer(), k = a.integer();
    const Tensor& ids = a.tensor();
    check_vector(ids, ids.numel(), at::kLong, "ids");
    TORCH_CHECK(w.numel() == packed_size(n, k, is_bf16(w)), "not a packed weight of this shape");
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.numel(); i++) TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < n, "id ", id[i], " is out of range");
    Tensor out = at::empty({ids.numel(), k}, w.options());
    gather_rows(w.const_data_ptr(), k, id, ids.numel(), out.data_ptr(), is_bf16(w));
    return THPVariable_Wrap(std::move(out));
}

PyObject* norm(Arguments& a) {  // x [t, h], residual [t, h] | None, weight [h], eps → [t, h]
    const Tensor& x = a.tensor();
    const std::optional<Tensor> residual = a.maybe();
    const Tensor& weight = a.tensor();
    const float eps = a.number();
    check_rows(x, "x");
    check_vector(weight, x.size(1), x.scalar_type(), "weight");
    if (residual) {
        check_rows(*residual, "residual");
        TORCH_CHECK(residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type(), "residual must be like x");
    }
    Tensor out = at::empty({x.size(0), x.size(1)}, x.options());
    rms_norm({x.const_data_ptr(), weight.const_data_ptr(), residual ? residual->data_ptr() : nullptr, out.data_ptr(), x.size(0), x.size(1),
              x.stride(0), residual ? residual->stride(0) : 0, eps, is_bf16(x)});
    return THPVariable_Wrap(std::move(out));
}

KVCache cache(const Tensor& kv, int64_t layer) {
    TORCH_CHECK(kv.dim() == 6 && kv.size(2) == 2 && kv.stride(5) == 1, "kv must be [blocks, layers, 2, kv heads, block size, head dim]");
    TORCH_CHECK((kv.size(4) & (kv.size(4) - 1)) == 0, "the block size must be a power of two");
    TORCH_CHECK(layer >= 0 && layer < kv.size(1), "no layer ", layer);
    char* data = (char*)kv.data_ptr() + layer * kv.stride(1) * kv.element_size();
    return {data, kv.stride(0), kv.stride(2), kv.stride(3), kv.stride(4), kv.size(4), kv.size(3)};
}

std::pair<const int64_t*, const int64_t*> check_places(
    const Tensor& cos_sin, const Tensor& positions, const Tensor& slots, const Tensor& kv, int64_t tokens) {
    TORCH_CHECK(cos_sin.is_contiguous() && cos_sin.size(-1) == kv.size(-1) && cos_sin.scalar_type() == at::kFloat,
                "cos_sin must be [positions, dim] fp32");
    check_vector(positions, tokens, at::kLong, "positions");
    check_vector(slots, tokens, at::kLong, "slots");
    const int64_t *at = positions.const_data_ptr<int64_t>(), *slot = slots.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; t++) {
        TORCH_CHECK(at[t] >= 0 && at[t] < cos_sin.size(0), "position ", at[t], " is beyond the table");
        TORCH_CHECK(slot[t] < kv.size(0) * kv.size(4), "slot ", slot[t], " is beyond the cache");
    }
    return {at, slot};
}

std::pair<const int32_t*, const int32_t*> check_sequences(
    const Tensor& tables, const Tensor& starts, const Tensor& contexts, const KVCache& place, int64_t tokens) {
    const int64_t sequences = contexts.numel();
    check_vector(starts, sequences + 1, at::kInt, "query_start");
    check_vector(contexts, sequences, at::kInt, "context_lens");
    check_rows(tables, "block_tables");
    TORCH_CHECK(tables.scalar_type() == at::kInt && tables.size(0) == sequences, "block_tables must be [sequences, blocks] int32");
    const int32_t *start = starts.const_data_ptr<int32_t>(), *context = contexts.const_data_ptr<int32_t>();
    for (int64_t s = 0; s < sequences; s++)
        TORCH_CHECK(start[s] >= 0 && start[s] <= start[s + 1] && start[s + 1] <= tokens && context[s] <= tables.size(1) * place.block_size,
                    "sequence ", s, ": query_start or context_lens is out of range");
    return {start, context};
}

PyObject* rope_write(Arguments& a) {  // qkv, cos_sin, positions, slots, kv, layer, num_heads, q_weight, k_weight, eps → q
    const Tensor &qkv = a.tensor(), &cos_sin = a.tensor(), &positions = a.tensor(), &slots = a.tensor(), &kv = a.tensor();
    const int64_t layer = a.integer(), heads = a.integer();
    const std::optional<Tensor> q_weight = a.maybe(), k_weight = a.maybe();
    const float eps = a.number();
    check_rows(qkv, "qkv");
    const int64_t tokens = qkv.size(0), dim = kv.size(-1);
    const KVCache place = cache(kv, layer);
    TORCH_CHECK(qkv.size(1) == (heads + 2 * place.num_heads) * dim && kv.scalar_type() == qkv.scalar_type(), "qkv and kv do not fit");
    TORCH_CHECK(dim % 2 == 0 && dim <= 512, "head_dim ", dim, " is not supported");
    const auto [at, slot] = check_places(cos_sin, positions, slots, kv, tokens);
    check_vector(q_weight, dim, qkv.scalar_type(), "q_weight");
    check_vector(k_weight, dim, qkv.scalar_type(), "k_weight");
    Tensor q = at::empty({tokens, heads, dim}, qkv.options());
    baton::rope_write({qkv.const_data_ptr(), cos_sin.const_data_ptr<float>(), at, slot, data_or_null(q_weight), data_or_null(k_weight), q.data_ptr(),
                place, tokens, qkv.stride(0), heads, dim, eps, is_bf16(qkv)});
    return THPVariable_Wrap(std::move(q));
}

// q, kv, layer, block_tables, query_start, context_lens, window (0: none), out | None → [tokens, heads, dim]
PyObject* paged_attention(Arguments& a) {
    const Tensor &q = a.tensor(), &kv = a.tensor();
    const int64_t layer = a.integer();
    const Tensor &tables = a.tensor(), &starts = a.tensor(), &contexts = a.tensor();
    const int64_t window = a.integer();
    const std::optional<Tensor> given = a.maybe();
    const KVCache place = cache(kv, layer);
    const int64_t dim = kv.size(-1), sequences = contexts.numel();
    auto check_heads = [&](const Tensor& t, const char* what) {
        TORCH_CHECK(t.dim() == 3 && t.size(2) == dim && t.stride(2) == 1 && t.stride(1) == dim && t.scalar_type() == kv.scalar_type(), what,
                    " must be [tokens, heads, head_dim] with contiguous tokens, of kv's type");
    };
    check_heads(q, "q");
    TORCH_CHECK(q.size(1) % place.num_heads == 0 && dim % 16 == 0 && dim <= 256, "heads or head_dim not supported");
    const auto [start, context] = check_sequences(tables, starts, contexts, place, q.size(0));
    Tensor out = given ? *given : at::empty({q.size(0), q.size(1), dim}, q.options());
    check_heads(out, "out");
    TORCH_CHECK(out.sizes() == q.sizes(), "out must be like q");
    if (sequences && start[sequences] < q.size(0)) out.slice(0, start[sequences]).zero_();
    {
        NoGil unlocked;
        baton::paged_attention({q.const_data_ptr(), out.data_ptr(), place, tables.const_data_ptr<int32_t>(), start, context, sequences, tables.stride(0),
                         q.size(1), dim, q.stride(0), out.stride(0), window, is_bf16(q)});
    }
    return THPVariable_Wrap(std::move(out));
}

PyObject* argmax(Arguments& a) {  // logits [r, v] → [r] int64
    const Tensor& logits = a.tensor();
    check_rows(logits, "logits");
    TORCH_CHECK(logits.size(1) > 0, "no columns");
    Tensor out = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
    const bool bf16 = is_bf16(logits);
    {
        NoGil unlocked;
        baton::argmax(logits.const_data_ptr(), logits.stride(0), logits.size(0), logits.size(1), out.data_ptr<int64_t>(), bf16);
    }
    return THPVariable_Wrap(std::move(out));
}

struct Prepared {  // a decoder and what its pointers point into
    Decoder decoder;
    std::vector<Tensor> weights;
};
constexpr const char* kPrepared = "baton.decoder";

// embedding, vocab, norm, head, hidden, intermediate, heads, kv heads, dim, eps, then 13 of each layer, in Layer's order → capsule
PyObject* decoder(Arguments& a) {
    auto made = std::make_unique<Prepared>();
    Decoder& d = made->decoder;
    const Tensor& embedding = a.tensor();
    const at::ScalarType dtype = embedding.scalar_type();
    d.is_bf16 = is_bf16(embedding);
    d.vocab = a.integer();
    auto keep = [&](const std::optional<Tensor>& t, int64_t size, const char* what) -> const void* {
        if (!t) return nullptr;
        check_vector(t, size, dtype, what);
        return made->weights.emplace_back(*t).const_data_ptr();
    };
    const Tensor &norm = a.tensor(), &head = a.tensor();
    d.hidden = a.integer(), d.intermediate = a.integer(), d.num_heads = a.integer(), d.num_kv_heads = a.integer(), d.dim = a.integer();
    d.eps = a.number();
    const int64_t heads = d.num_heads * d.dim, qkv = heads + 2 * d.num_kv_heads * d.dim;
    auto packed = [&](int64_t n, int64_t k) { return keep(a.tensor(), packed_size(n, k, d.is_bf16), "packed weight"); };
    auto vector = [&](int64_t size) { return keep(a.maybe(), size, "weight or bias"); };
    d.embedding = keep(embedding, packed_size(d.vocab, d.hidden, d.is_bf16), "embedding");
    d.norm = keep(norm, d.hidden, "norm");
    d.head = keep(head, packed_size(d.vocab, d.hidden, d.is_bf16), "head");
    while (a.left()) {
        Layer& w = d.layers.emplace_back();
        w.input_norm = vector(d.hidden), w.qkv = packed(qkv, d.hidden), w.qkv_bias = vector(qkv), w.q_norm = vector(d.dim), w.k_norm = vector(d.dim);
        w.o = packed(d.hidden, heads), w.o_bias = vector(d.hidden), w.post_norm = vector(d.hidden);
        w.gate_up = keep(a.tensor(), packed_size(2 * d.intermediate, d.hidden, d.is_bf16, true), "packed gate and up");
        w.gate_up_bias = vector(2 * d.intermediate);
        w.down = packed(d.hidden, d.intermediate), w.down_bias = vector(d.hidden), w.window = a.integer();
        TORCH_CHECK(w.input_norm && w.post_norm, "a layer lacks a norm");
    }
    TORCH_CHECK(!d.layers.empty() && d.dim % 16 == 0 && d.dim <= 256, "no layers, or heads of ", d.dim);
    return PyCapsule_New(made.release(), kPrepared, [](PyObject* o) { delete (Prepared*)PyCapsule_GetPointer(o, kPrepared); });
}

// capsule, token_ids, positions, slots, cos_sin, kv, block_tables, query_start, context_lens, rows | None → logits [rows, vocab]
PyObject* forward(Arguments& a) {
    const auto* prepared = (const Prepared*)PyCapsule_GetPointer(a.object(), kPrepared);
    TORCH_CHECK(prepared, "not a decoder");
    const Decoder& d = prepared->decoder;
    const Tensor &ids = a.tensor(), &positions = a.tensor(), &slots = a.tensor(), &cos_sin = a.tensor(), &kv = a.tensor();
    const Tensor &tables = a.tensor(), &starts = a.tensor(), &contexts = a.tensor();
    const std::optional<Tensor> rows = a.maybe();
    const int64_t tokens = ids.numel(), sequences = contexts.numel();
    const KVCache place = cache(kv, 0);
    TORCH_CHECK(kv.size(1) == int64_t(d.layers.size()) && kv.size(3) == d.num_kv_heads && kv.size(5) == d.dim && is_bf16(kv) == d.is_bf16, "kv does not fit the model");
    check_vector(ids, tokens, at::kLong, "token_ids");
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; t++) TORCH_CHECK(id[t] >= 0 && id[t] < d.vocab, "token id ", id[t], " is beyond the vocabulary");
    const auto [at, slot] = check_places(cos_sin, positions, slots, kv, tokens);
    const auto [start, context] = check_sequences(tables, starts, contexts, place, tokens);
    TORCH_CHECK(sequences && start[0] == 0 && start[sequences] == tokens, "the sequences must own all rows");
    const int64_t wanted = rows ? rows->numel() : tokens;
    check_vector(rows, wanted, at::kLong, "rows");
    const int64_t* row = rows ? rows->const_data_ptr<int64_t>() : nullptr;
    for (int64_t i = 0; row && i < wanted; i++) TORCH_CHECK(row[i] >= 0 && row[i] < tokens, "no row ", row[i]);
    Tensor logits = at::empty({wanted, d.vocab}, kv.options());
    {
        NoGil unlocked;
        baton::forward(d, {id, at, slot, cos_sin.const_data_ptr<float>(), place, kv.stride(1) * kv.element_size(), tables.const_data_ptr<int32_t>(),
                           start, context, sequences, tables.stride(0), tokens, row, rows ? wanted : -1, logits.data_ptr()});
    }
    return THPVariable_Wrap(std::move(logits));
}

PyObject* own_threads(Arguments& a) {  // 0 | 1
    use_own_threads(a.integer() != 0);
    Py_RETURN_NONE;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)())guarded<name>, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {FUNCTION(pack),   FUNCTION(linear),     FUNCTION(gather),          FUNCTION(norm),
                         FUNCTION(rope_write), FUNCTION(paged_attention), FUNCTION(argmax),
                         FUNCTION(decoder), FUNCTION(forward),  FUNCTION(own_threads), {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "baton_cpu_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace baton

PyMODINIT_FUNC PyInit_baton_cpu_kernels() { return PyModule_Create(&baton::module); }
