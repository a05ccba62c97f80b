// attention: o = P v with P = softmax(scale · q kᵀ + mask), per example and head; L queries, S keys, E features of q and k, F of v.
//
//   jvp   t_S = scale (t_q kᵀ + q t_kᵀ) + t_mask,  t_P = P ∘ (t_S − rowsum(P ∘ t_S)),  t_o = t_P v + P t_v
//   vjp   g_v = Pᵀ g_o,  g_P = g_o vᵀ,  g_S = P ∘ (g_P − rowsum(P ∘ g_P)),  g_q = scale g_S k,  g_k = scale g_Sᵀ q,  g_mask = g_S
//
//   second order   at a cotangent g_o, with u = t_S − rowsum(P ∘ t_S), c = g_P − rowsum(P ∘ g_P), w = u ∘ c + g_o t_vᵀ, h = P ∘ (w − rowsum(P ∘ w)):
//         S_v = (P ∘ u)ᵀ g_o,  S_q = scale (h k + g_S t_k),  S_k = scale (hᵀ q + g_Sᵀ t_q),  S_mask = h
//
// Works on blocks of queries: scores of one block and one right-hand side at a time, so no array of V · L · S elements exists. Per head and block the
// right-hand sides share P and the packed k and v. `heads` heads of q read `key_heads` of k and v, heads / key_heads each (grouped queries).
// Rows whose keys are all masked give 0, and 0 derivatives. With `causal`, query l sees keys 0..l and blocks leave out the keys beyond their last
// row.
//
// At a reduced Context::precision products round their factors, but for those that belong to the point: q kᵀ, which gives P, and c.
//
// P is read from `p` if that is given (kept by the forward pass), else computed again from q, k and the mask. Counted per element of P and direction:
// reading costs 4 bytes, computing 2 E operations and an exponential, the products themselves 4 (E + F) operations per right-hand side. So keeping
// is faster, and attention_keeps_probabilities() does so while the tape stays within three times q, k, v and o.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "kernels/gemm.h"

namespace infl {

// Element (n, head, row, feature) at n * example + head * head + row * row + feature.
struct HeadStrides {
  int64_t example = 0, head = 0, row = 0;
};

// Element (n, head, l, s) at n * example + offsets[head] + l * row + s * col.
struct MaskStrides {
  int64_t example = 0;
  const int64_t* offsets = nullptr;  // one a head
  int64_t row = 0, col = 0;
};

template <class T>
struct Attention {
  int64_t V = 1, n = 0, heads = 1, key_heads = 1, L = 0, S = 0, E = 0, F = 0;
  T scale = 1;
  bool causal = false;
  HeadStrides q_at, k_at, v_at, o_at;
  const T *q = nullptr, *k = nullptr, *v = nullptr;
  const T* mask = nullptr;       // read only where P is computed; may be absent
  bool mask_is_boolean = false;  // 0 hides a key; else it is added to the scores
  MaskStrides mask_at;
  T* p = nullptr;        // [n, heads, L, S] or absent
  T* scratch = nullptr;  // attention_scratch_size elements
};

// Tangents of [V, n, …] with the layout of the values; null: zero. t_mask has right-hand sides mask_stride apart.
template <class T>
struct AttentionTangents {
  const T *q = nullptr, *k = nullptr, *v = nullptr, *mask = nullptr;
  int64_t mask_stride = 0;
};

// Cotangents wanted: what is null is not computed. Written, or added to with `accumulate`. A mask without an axis is summed over it;
// `mask_example` is the distance of examples in g_mask (0: summed too), mask_size the elements of one.
template <class T>
struct AttentionCotangents {
  T *q = nullptr, *k = nullptr, *v = nullptr, *mask = nullptr;
  int64_t mask_stride = 0, mask_example = 0, mask_size = 0;
  bool accumulate = false;
};

inline bool attention_keeps_probabilities(int64_t heads, int64_t key_heads, int64_t L, int64_t S, int64_t E, int64_t F) {
  return heads * L * S <= 2 * (heads * L + key_heads * S) * (E + F);
}

// Queries handled together: their scores stay in the first-level cache or near it. Causal blocks are smaller, to leave out more keys.
template <class T>
int64_t attention_block(const Attention<T>& a) {
  constexpr int64_t kBytes = 64 << 10, kRows = 24;
  int64_t rows = std::max<int64_t>(kRows, kBytes / (a.S * static_cast<int64_t>(sizeof(T))) / kRows * kRows);
  if (a.causal) rows = std::min(rows, 2 * kRows);
  return std::min(rows, a.L);
}

// Elements of scratch for one thread of the CPU; a device's kernels take their own.
template <class T>
int64_t attention_thread_scratch_size(const Attention<T>& a) {
  const int64_t block = attention_block(a), group = a.heads / a.key_heads;
  const int64_t tangents = a.L > block || group > 1 ? a.V : 1;
  const int64_t keys = gemm_packed_size<T>(a.E, a.S) + gemm_packed_size<T>(a.S, a.E),
                values = gemm_packed_size<T>(a.S, a.F) + gemm_packed_size<T>(a.F, a.S);
  const int64_t chunks = 2 * block * a.S + (1 + tangents) * (keys + values) + gemm_packed_size<T>(block, a.E) + gemm_packed_size<T>(block, a.F);
  return chunks + 16 * 8;  // each chunk aligned
}

template <class T>
int64_t attention_scratch_size(const Context& ctx, const Attention<T>& a) {
  return ctx.on_device() ? 0 : ctx.num_threads * attention_thread_scratch_size(a);
}

// The same for second-order products.
template <class T>
int64_t attention_second_order_thread_scratch_size(const Attention<T>& a) {
  const int64_t block = attention_block(a), group = a.heads / a.key_heads;
  const int64_t tangents = a.L > block || group > 1 ? a.V : 1;
  const int64_t keys = gemm_packed_size<T>(a.E, a.S) + gemm_packed_size<T>(a.S, a.E), values = gemm_packed_size<T>(a.F, a.S);
  const int64_t rows = 2 * gemm_packed_size<T>(block, a.E) + gemm_packed_size<T>(block, a.F);
  return 5 * block * a.S + (1 + tangents) * (keys + values) + rows + 16 * 14;  // each chunk aligned
}

template <class T>
int64_t attention_second_order_scratch_size(const Context& ctx, const Attention<T>& a) {
  return ctx.device == Device::cpu ? ctx.num_threads * attention_second_order_thread_scratch_size(a) : 0;
}

// o from q, k, v and mask; fills p if it is given.
template <class T>
inline KernelStub<void(const Context&, const Attention<T>&, T* o)> attention_forward_stub{"attention_forward"};

template <class T>
inline KernelStub<void(const Context&, const Attention<T>&, const AttentionTangents<T>&, T* t_o)> attention_jvp_stub{"attention_jvp"};

template <class T>
inline KernelStub<void(const Context&, const Attention<T>&, const T* g_o, const AttentionCotangents<T>&)> attention_vjp_stub{"attention_vjp"};

// Adds S to what is wanted (g.accumulate is taken as true); g_o [n, …], `scratch` of attention_second_order_scratch_size elements.
template <class T>
inline KernelStub<void(const Context&, const Attention<T>&, const T* g_o, const AttentionTangents<T>&, const AttentionCotangents<T>&)>
    attention_second_order_stub{"attention_second_order"};

}  // namespace infl
