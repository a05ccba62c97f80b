// An item is one example and one key head, with all query heads that read it; threads take items. Within an item gemm runs alone.
#include "kernels/attention.h"

#include "kernels/cpu/parallel.h"
#include "math/exp.h"

namespace infl {
namespace INFL_ISA {
namespace {

constexpr Context kAlone{};  // one thread of this machine, in full precision

// The same at the precision of products.
Context alone(const Context& ctx) { return {.num_threads = 1, .precision = ctx.precision}; }

// A matrix that is the right factor of products, packed once.
template <class T>
struct Packed {
  const T* data;
  int64_t K, N;
};

// Hands out aligned pieces of a thread's scratch.
template <class T>
class Scratch {
 public:
  explicit Scratch(T* data) : next_(data) {}
  T* take(int64_t size) {
    T* piece = next_;
    next_ += (size + 15) / 16 * 16;
    return piece;
  }
  // B [K, N] with element (k, n) at b[k * row + n * col].
  Packed<T> pack(int64_t K, int64_t N, const T* b, int64_t row, int64_t col) {
    T* piece = take(gemm_packed_size<T>(K, N));
    gemm_pack_stub<T>(kAlone, 1, K, N, b, 0, row, col, piece);
    return {piece, K, N};
  }

 private:
  T* next_;
};

template <class T>
struct Left {
  const T* data;  // null: the term is absent
  int64_t row, col;
};

// C [M, N] (+)= A₀ B₀ + A₁ B₁ over the first K rows of B.
template <class T>
void product(const Context& ctx, int64_t M, int64_t K, int64_t N, T* c, int64_t ldc, bool accumulate, Left<T> a0, Packed<T> b0, Left<T> a1 = {},
             Packed<T> b1 = {}) {
  const int64_t panel = 2 * kLanes<T>;
  Gemm<T> g;
  g.M = M;
  g.ldc = ldc;
  g.accumulate = accumulate;
  // Panels lie K of the packed matrix apart: a shorter sum goes through them one by one.
  const bool shorter = (a0.data && K < b0.K) || (a1.data && K < b1.K);
  const int64_t step = shorter ? panel : N;
  for (int64_t n = 0; n < N; n += step) {
    g.N = std::min(step, N - n);
    g.c = c + n;
    const Left<T> a[2] = {a0, a1};
    const Packed<T> b[2] = {b0, b1};
    for (int t = 0; t < 2; ++t) {
      if (a[t].data == nullptr) continue;
      g.terms[t].K = K;
      g.terms[t].a = a[t].data;
      g.terms[t].a_row = a[t].row;
      g.terms[t].a_col = a[t].col;
      g.terms[t].packed = b[t].data + n * b[t].K;
    }
    gemm_stub<T>(ctx, g);
  }
}

// One block of queries of one head.
template <class T>
struct Block {
  int64_t n, head, key_head, l0, rows, keys;  // keys: those that some row sees
};

template <class T>
void zero_rows(T* data, const HeadStrides& at, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) std::memset(data + r * at.row, 0, width * sizeof(T));
}

template <class T>
const T* head_of(const T* data, const HeadStrides& at, int64_t n, int64_t head) {
  return data + n * at.example + head * at.head;
}

template <class T>
T* head_of(T* data, const HeadStrides& at, int64_t n, int64_t head) {
  return data + n * at.example + head * at.head;
}

// One row of scores -> probabilities.
template <class T>
void softmax_row(const Attention<T>& a, const Block<T>& b, int64_t row, T* s) {
  const int64_t l = b.l0 + row, visible = a.causal ? std::min(b.keys, l + 1) : b.keys;
  constexpr T kHidden = -std::numeric_limits<T>::infinity();
  if (a.mask) {
    const T* mask = a.mask + b.n * a.mask_at.example + a.mask_at.offsets[b.head] + l * a.mask_at.row;
    const int64_t col = a.mask_at.col;
    if (a.mask_is_boolean) {
      for (int64_t j = 0; j < visible; ++j) s[j] = mask[j * col] != T(0) ? s[j] * a.scale : kHidden;
    } else {
      for (int64_t j = 0; j < visible; ++j) s[j] = s[j] * a.scale + mask[j * col];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < visible; ++j) s[j] *= a.scale;
  }
  T highest = kHidden;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < visible; ++j) highest = s[j] > highest ? s[j] : highest;
  if (highest == kHidden) {
    for (int64_t j = 0; j < b.keys; ++j) s[j] = std::isnan(s[0]) ? s[0] : T(0);
    return;
  }
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < visible; ++j) {
    s[j] = infl::exp_nonpositive(s[j] - highest);
    sum += s[j];
  }
  const T inverse = T(1) / sum;
#pragma omp simd
  for (int64_t j = 0; j < visible; ++j) s[j] *= inverse;
  for (int64_t j = visible; j < b.keys; ++j) s[j] = T(0);
}

// P of a block, rows S apart, computed into `p`.
template <class T>
void compute_probabilities(const Attention<T>& a, const Block<T>& b, Packed<T> k_transposed, T* p) {
  const T* q = head_of(a.q, a.q_at, b.n, b.head) + b.l0 * a.q_at.row;
  product<T>(kAlone, b.rows, a.E, b.keys, p, a.S, false, {q, a.q_at.row, 1}, k_transposed);
  for (int64_t r = 0; r < b.rows; ++r) softmax_row(a, b, r, p + r * a.S);
}

template <class T>
T* kept_probabilities(const Attention<T>& a, const Block<T>& b) {
  return a.p + ((b.n * a.heads + b.head) * a.L + b.l0) * a.S;
}

// t ← factor · P ∘ (t − Σ P ∘ t): the derivative of softmax, its own transpose.
template <class T>
void softmax_derivative(const T* p, int64_t keys, T factor, T* t) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < keys; ++j) dot += p[j] * t[j];
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) t[j] = factor * p[j] * (t[j] - dot);
}

// t ← t − Σ P ∘ t
template <class T>
void centre_row(const T* p, int64_t keys, T* t) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < keys; ++j) dot += p[j] * t[j];
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) t[j] -= dot;
}

// body(block) for all blocks of the query heads of one item.
template <class T, class Body>
void for_blocks(const Attention<T>& a, int64_t n, int64_t key_head, const Body& body) {
  const int64_t group = a.heads / a.key_heads, size = attention_block(a);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t l0 = 0; l0 < a.L; l0 += size) {
      const int64_t rows = std::min(size, a.L - l0);
      body(Block<T>{n, head, key_head, l0, rows, a.causal ? std::min(a.S, l0 + rows) : a.S});
    }
  }
}

template <class T>
int threads_for(const Context& ctx, const Attention<T>& a) {
  return static_cast<double>(a.V) * a.n * a.heads * a.L * a.S * (a.E + a.F) < 65536 ? 1 : ctx.num_threads;
}

// body(n, key head, scratch of `size` elements) for all items.
template <class T, class Body>
void for_items(const Context& ctx, const Attention<T>& a, int64_t size, const Body& body) {
  const int threads = threads_for(ctx, a);
  const int64_t items = a.n * a.key_heads;
  // One thread may be any of those of a schedule that is parallel itself: it has this scratch to itself.
  parallel_for(threads, items,
               [&](int64_t i) { body(i / a.key_heads, i % a.key_heads, a.scratch + (threads > 1 ? omp_get_thread_num() : 0) * size); });
}

template <class T, class Body>
void for_items(const Context& ctx, const Attention<T>& a, const Body& body) {
  for_items(ctx, a, attention_thread_scratch_size(a), body);
}

template <class T>
void attention_forward(const Context& ctx, const Attention<T>& a, T* o) {
  for_items(ctx, a, [&](int64_t n, int64_t key_head, T* memory) {
    Scratch<T> scratch(memory);
    const Packed<T> k_transposed = scratch.pack(a.E, a.S, head_of(a.k, a.k_at, n, key_head), 1, a.k_at.row);
    const Packed<T> v = scratch.pack(a.S, a.F, head_of(a.v, a.v_at, n, key_head), a.v_at.row, 1);
    T* own = scratch.take(attention_block(a) * a.S);
    for_blocks(a, n, key_head, [&](const Block<T>& b) {
      T* p = a.p ? kept_probabilities(a, b) : own;
      compute_probabilities(a, b, k_transposed, p);
      product<T>(kAlone, b.rows, b.keys, a.F, head_of(o, a.o_at, n, b.head) + b.l0 * a.o_at.row, a.o_at.row, false, {p, a.S, 1}, v);
    });
  });
}

template <class T>
void attention_jvp(const Context& given, const Attention<T>& a, const AttentionTangents<T>& t, T* t_o) {
  const Context ctx = alone(given);
  const bool scores_move = t.q || t.k || t.mask;
  const bool one_block = a.heads == a.key_heads && a.L <= attention_block(a);
  for_items(given, a, [&](int64_t n, int64_t key_head, T* memory) {
    Scratch<T> scratch(memory);
    Packed<T> k_transposed{}, v{};
    if (t.q || a.p == nullptr) k_transposed = scratch.pack(a.E, a.S, head_of(a.k, a.k_at, n, key_head), 1, a.k_at.row);
    if (scores_move) v = scratch.pack(a.S, a.F, head_of(a.v, a.v_at, n, key_head), a.v_at.row, 1);
    T* own = scratch.take(attention_block(a) * a.S);
    T* scores = scratch.take(attention_block(a) * a.S);
    // The tangents of k and v, for each right-hand side: kept packed if several blocks read them.
    const int64_t k_size = gemm_packed_size<T>(a.E, a.S), v_size = gemm_packed_size<T>(a.S, a.F);
    T* t_k = scratch.take((one_block ? 1 : a.V) * k_size);
    T* t_v = scratch.take((one_block ? 1 : a.V) * v_size);
    const auto pack = [&](int64_t i, T* k_to, T* v_to) {
      const int64_t e = i * a.n + n;
      if (t.k) gemm_pack_stub<T>(kAlone, 1, a.E, a.S, head_of(t.k, a.k_at, e, key_head), 0, 1, a.k_at.row, k_to);
      if (t.v) gemm_pack_stub<T>(kAlone, 1, a.S, a.F, head_of(t.v, a.v_at, e, key_head), 0, a.v_at.row, 1, v_to);
    };
    for (int64_t i = 0; i < a.V && !one_block; ++i) pack(i, t_k + i * k_size, t_v + i * v_size);

    for_blocks(a, n, key_head, [&](const Block<T>& b) {
      T* p = a.p ? kept_probabilities(a, b) : own;
      if (a.p == nullptr) compute_probabilities(a, b, k_transposed, p);
      const T* q = head_of(a.q, a.q_at, n, b.head) + b.l0 * a.q_at.row;
      for (int64_t i = 0; i < a.V; ++i) {
        if (one_block) pack(i, t_k, t_v);
        const int64_t e = i * a.n + n, kept = one_block ? 0 : i;
        if (scores_move) {
          const Left<T> t_q{t.q ? head_of(t.q, a.q_at, e, b.head) + b.l0 * a.q_at.row : nullptr, a.q_at.row, 1};
          product<T>(ctx, b.rows, a.E, b.keys, scores, a.S, false, t_q, k_transposed, {t.k ? q : nullptr, a.q_at.row, 1},
                     {t_k + kept * k_size, a.E, a.S});
          for (int64_t r = 0; r < b.rows; ++r) {
            T* row = scores + r * a.S;
            if (t.mask) {
              const MaskStrides& at = a.mask_at;
              const T* mask = t.mask + i * t.mask_stride + n * at.example + at.offsets[b.head] + (b.l0 + r) * at.row;
              for (int64_t j = 0; j < b.keys; ++j) row[j] = a.scale * row[j] + mask[j * at.col];
            }
            softmax_derivative(p + r * a.S, b.keys, t.mask ? T(1) : a.scale, row);
          }
        }
        product<T>(ctx, b.rows, b.keys, a.F, head_of(t_o, a.o_at, e, b.head) + b.l0 * a.o_at.row, a.o_at.row, false,
                   {scores_move ? scores : nullptr, a.S, 1}, v, {t.v ? p : nullptr, a.S, 1}, {t_v + kept * v_size, a.S, a.F});
      }
    });
  });
}

// g_mask += the rows of g_S it was broadcast to.
template <class T>
void add_to_mask(const Attention<T>& a, const Block<T>& b, const T* scores, T* g_mask) {
  const int64_t col = a.mask_at.col;
  for (int64_t r = 0; r < b.rows; ++r) {
    T* to = g_mask + a.mask_at.offsets[b.head] + (b.l0 + r) * a.mask_at.row;
    for (int64_t j = 0; j < b.keys; ++j) to[j * col] += scores[r * a.S + j];
  }
}

// One item, right-hand sides [v0, v1).
template <class T>
void attention_vjp_item(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionCotangents<T>& g, int64_t v0, int64_t v1, int64_t n,
                        int64_t key_head, T* memory) {
  const bool through_scores = g.q || g.k || g.mask;
  Scratch<T> scratch(memory);
  Packed<T> k_transposed{}, v_transposed{}, k{};
  const T *k_data = head_of(a.k, a.k_at, n, key_head), *v_data = head_of(a.v, a.v_at, n, key_head);
  if (a.p == nullptr) k_transposed = scratch.pack(a.E, a.S, k_data, 1, a.k_at.row);
  if (through_scores) v_transposed = scratch.pack(a.F, a.S, v_data, 1, a.v_at.row);
  if (g.q) k = scratch.pack(a.S, a.E, k_data, a.k_at.row, 1);
  T* own = scratch.take(attention_block(a) * a.S);
  T* scores = scratch.take(attention_block(a) * a.S);
  T* q_packed = scratch.take(gemm_packed_size<T>(attention_block(a), a.E));
  T* g_o_packed = scratch.take(gemm_packed_size<T>(attention_block(a), a.F));
  for (int64_t i = v0; i < v1 && !g.accumulate; ++i) {
    if (g.k) zero_rows(head_of(g.k, a.k_at, i * a.n + n, key_head), a.k_at, a.S, a.E);
    if (g.v) zero_rows(head_of(g.v, a.v_at, i * a.n + n, key_head), a.v_at, a.S, a.F);
  }
  for_blocks(a, n, key_head, [&](const Block<T>& b) {
    T* p = a.p ? kept_probabilities(a, b) : own;
    if (a.p == nullptr) compute_probabilities(a, b, k_transposed, p);
    if (g.k) gemm_pack_stub<T>(kAlone, 1, b.rows, a.E, head_of(a.q, a.q_at, n, b.head) + b.l0 * a.q_at.row, 0, a.q_at.row, 1, q_packed);
    for (int64_t i = v0; i < v1; ++i) {
      const int64_t e = i * a.n + n;
      const T* g_block = head_of(g_o, a.o_at, e, b.head) + b.l0 * a.o_at.row;
      if (g.v) {
        gemm_pack_stub<T>(kAlone, 1, b.rows, a.F, g_block, 0, a.o_at.row, 1, g_o_packed);
        product<T>(ctx, b.keys, b.rows, a.F, head_of(g.v, a.v_at, e, key_head), a.v_at.row, true, {p, 1, a.S}, {g_o_packed, b.rows, a.F});
      }
      if (!through_scores) continue;
      product<T>(ctx, b.rows, a.F, b.keys, scores, a.S, false, {g_block, a.o_at.row, 1}, v_transposed);
      for (int64_t r = 0; r < b.rows; ++r) softmax_derivative(p + r * a.S, b.keys, g.mask ? T(1) : a.scale, scores + r * a.S);
      if (g.mask) {
        add_to_mask(a, b, scores, g.mask + i * g.mask_stride + n * g.mask_example);
        for (int64_t r = 0; r < b.rows && (g.q || g.k); ++r) {
          for (int64_t j = 0; j < b.keys; ++j) scores[r * a.S + j] *= a.scale;
        }
      }
      if (g.q) {
        product<T>(ctx, b.rows, b.keys, a.E, head_of(g.q, a.q_at, e, b.head) + b.l0 * a.q_at.row, a.q_at.row, g.accumulate, {scores, a.S, 1}, k);
      }
      if (g.k) product<T>(ctx, b.keys, b.rows, a.E, head_of(g.k, a.k_at, e, key_head), a.k_at.row, true, {scores, 1, a.S}, {q_packed, b.rows, a.E});
    }
  });
}

template <class T>
void attention_vjp(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionCotangents<T>& g) {
  if (g.mask == nullptr) {
    for_items(ctx, a, [&](int64_t n, int64_t key_head, T* memory) { attention_vjp_item(alone(ctx), a, g_o, g, 0, a.V, n, key_head, memory); });
    return;
  }
  // Items may share elements of the mask: threads take right-hand sides.
  const int threads = threads_for(ctx, a);
  const int64_t size = attention_thread_scratch_size(a);
  parallel_for(threads, a.V, [&](int64_t i) {
    T* mask = g.mask + i * g.mask_stride;
    if (!g.accumulate) {
      for (int64_t n = 0; n < (g.mask_example ? a.n : 1); ++n) std::memset(mask + n * g.mask_example, 0, g.mask_size * sizeof(T));
    }
    for (int64_t item = 0; item < a.n * a.key_heads; ++item) {
      T* scratch = a.scratch + (threads > 1 ? omp_get_thread_num() : 0) * size;
      attention_vjp_item(alone(ctx), a, g_o, g, i, i + 1, item / a.key_heads, item % a.key_heads, scratch);
    }
  });
}

// One item, right-hand sides [v0, v1).
template <class T>
void attention_second_order_item(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionTangents<T>& t,
                                 const AttentionCotangents<T>& g, int64_t v0, int64_t v1, int64_t n, int64_t key_head, T* memory) {
  const bool scores_move = t.q || t.k || t.mask, through_scores = g.q || g.k || g.mask;
  const bool one_block = a.heads == a.key_heads && a.L <= attention_block(a);
  Scratch<T> scratch(memory);
  const T *k_data = head_of(a.k, a.k_at, n, key_head), *v_data = head_of(a.v, a.v_at, n, key_head);
  const Packed<T> k_transposed = scratch.pack(a.E, a.S, k_data, 1, a.k_at.row), k = scratch.pack(a.S, a.E, k_data, a.k_at.row, 1);
  const Packed<T> v_transposed = scratch.pack(a.F, a.S, v_data, 1, a.v_at.row);
  const int64_t block = attention_block(a) * a.S;
  T *own = scratch.take(block), *centred = scratch.take(block), *g_scores = scratch.take(block);  // P, c, scale · g_S: shared by right-hand sides
  T *u = scratch.take(block), *h = scratch.take(block);
  T *q_packed = scratch.take(gemm_packed_size<T>(attention_block(a), a.E)), *t_q_packed = scratch.take(gemm_packed_size<T>(attention_block(a), a.E));
  T* g_packed = scratch.take(gemm_packed_size<T>(attention_block(a), a.F));
  // The tangents of k and v, for each right-hand side: kept packed if several blocks read them.
  const int64_t k_size = gemm_packed_size<T>(a.S, a.E), kt_size = gemm_packed_size<T>(a.E, a.S), vt_size = gemm_packed_size<T>(a.F, a.S);
  const int64_t held = one_block ? 1 : a.V;
  T *t_k = scratch.take(held * k_size), *t_kt = scratch.take(held * kt_size), *t_vt = scratch.take(held * vt_size);
  const auto pack = [&](int64_t i, int64_t to) {
    const int64_t e = i * a.n + n;
    if (t.k) {
      const T* from = head_of(t.k, a.k_at, e, key_head);
      gemm_pack_stub<T>(kAlone, 1, a.S, a.E, from, 0, a.k_at.row, 1, t_k + to * k_size);
      gemm_pack_stub<T>(kAlone, 1, a.E, a.S, from, 0, 1, a.k_at.row, t_kt + to * kt_size);
    }
    if (t.v) gemm_pack_stub<T>(kAlone, 1, a.F, a.S, head_of(t.v, a.v_at, e, key_head), 0, 1, a.v_at.row, t_vt + to * vt_size);
  };
  for (int64_t i = v0; i < v1 && !one_block; ++i) pack(i, i);

  for_blocks(a, n, key_head, [&](const Block<T>& b) {
    T* p = a.p ? kept_probabilities(a, b) : own;
    if (a.p == nullptr) compute_probabilities(a, b, k_transposed, p);
    const T* q = head_of(a.q, a.q_at, n, b.head) + b.l0 * a.q_at.row;
    const Left<T> g_block{head_of(g_o, a.o_at, n, b.head) + b.l0 * a.o_at.row, a.o_at.row, 1};
    gemm_pack_stub<T>(kAlone, 1, b.rows, a.E, q, 0, a.q_at.row, 1, q_packed);
    gemm_pack_stub<T>(kAlone, 1, b.rows, a.F, g_block.data, 0, a.o_at.row, 1, g_packed);
    product<T>(kAlone, b.rows, a.F, b.keys, centred, a.S, false, g_block, v_transposed);
    for (int64_t r = 0; r < b.rows; ++r) {
      centre_row(p + r * a.S, b.keys, centred + r * a.S);
      for (int64_t j = r * a.S; j < r * a.S + b.keys; ++j) g_scores[j] = a.scale * p[j] * centred[j];
    }
    for (int64_t i = v0; i < v1; ++i) {
      const int64_t e = i * a.n + n, at = one_block ? 0 : i;
      if (one_block) pack(i, 0);
      const T* t_q = t.q ? head_of(t.q, a.q_at, e, b.head) + b.l0 * a.q_at.row : nullptr;
      // h: first what v's tangent gives, g_o t_vᵀ, or nothing
      if (through_scores && t.v) {
        product<T>(ctx, b.rows, a.F, b.keys, h, a.S, false, g_block, {t_vt + at * vt_size, a.F, a.S});
      } else {
        std::memset(h, 0, b.rows * a.S * sizeof(T));
      }
      if (scores_move) {
        product<T>(ctx, b.rows, a.E, b.keys, u, a.S, false, {t_q, a.q_at.row, 1}, k_transposed, {t.k ? q : nullptr, a.q_at.row, 1},
                   {t_kt + at * kt_size, a.E, a.S});
        if (t.q == nullptr && t.k == nullptr) std::memset(u, 0, b.rows * a.S * sizeof(T));
        for (int64_t r = 0; r < b.rows; ++r) {
          T* row = u + r * a.S;
          for (int64_t j = 0; j < b.keys; ++j) row[j] *= a.scale;
          if (t.mask) {
            const T* mask = t.mask + i * t.mask_stride + n * a.mask_at.example + a.mask_at.offsets[b.head] + (b.l0 + r) * a.mask_at.row;
            for (int64_t j = 0; j < b.keys; ++j) row[j] += mask[j * a.mask_at.col];
          }
          centre_row(p + r * a.S, b.keys, row);
#pragma omp simd
          for (int64_t j = 0; j < b.keys; ++j) {
            h[r * a.S + j] += row[j] * centred[r * a.S + j];
            row[j] *= p[r * a.S + j];
          }
        }
        if (g.v) product<T>(ctx, b.keys, b.rows, a.F, head_of(g.v, a.v_at, e, key_head), a.v_at.row, true, {u, 1, a.S}, {g_packed, b.rows, a.F});
      }
      if (!through_scores) continue;
      for (int64_t r = 0; r < b.rows; ++r) softmax_derivative(p + r * a.S, b.keys, T(1), h + r * a.S);
      if (g.mask) add_to_mask(a, b, h, g.mask + i * g.mask_stride + n * g.mask_example);
      for (int64_t r = 0; r < b.rows; ++r) {
        for (int64_t j = 0; j < b.keys; ++j) h[r * a.S + j] *= a.scale;
      }
      if (g.q) {
        product<T>(ctx, b.rows, b.keys, a.E, head_of(g.q, a.q_at, e, b.head) + b.l0 * a.q_at.row, a.q_at.row, true, {h, a.S, 1}, k,
                   {t.k ? g_scores : nullptr, a.S, 1}, {t_k + at * k_size, a.S, a.E});
      }
      if (g.k) {
        if (t_q) gemm_pack_stub<T>(kAlone, 1, b.rows, a.E, t_q, 0, a.q_at.row, 1, t_q_packed);
        product<T>(ctx, b.keys, b.rows, a.E, head_of(g.k, a.k_at, e, key_head), a.k_at.row, true, {h, 1, a.S}, {q_packed, b.rows, a.E},
                   {t_q ? g_scores : nullptr, 1, a.S}, {t_q_packed, b.rows, a.E});
      }
    }
  });
}

template <class T>
void attention_second_order(const Context& ctx, const Attention<T>& a, const T* g_o, const AttentionTangents<T>& t, const AttentionCotangents<T>& g) {
  const int64_t size = attention_second_order_thread_scratch_size(a);
  if (g.mask == nullptr) {
    for_items(ctx, a, size,
              [&](int64_t n, int64_t key_head, T* memory) { attention_second_order_item(alone(ctx), a, g_o, t, g, 0, a.V, n, key_head, memory); });
    return;
  }
  // Items may share elements of the mask: threads take right-hand sides.
  const int threads = threads_for(ctx, a);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.V; ++i) {
    for (int64_t item = 0; item < a.n * a.key_heads; ++item) {
      attention_second_order_item(alone(ctx), a, g_o, t, g, i, i + 1, item / a.key_heads, item % a.key_heads,
                                  a.scratch + omp_get_thread_num() * size);
    }
  }
}

INFL_REGISTER_CPU(attention_second_order_stub, attention_second_order)
INFL_REGISTER_CPU(attention_forward_stub, attention_forward)
INFL_REGISTER_CPU(attention_jvp_stub, attention_jvp)
INFL_REGISTER_CPU(attention_vjp_stub, attention_vjp)

}  // namespace
}  // namespace INFL_ISA
}  // namespace infl
