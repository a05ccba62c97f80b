// Products on tensor cores: mma.sync of sm_80 and later, at four kinds of arithmetic, and a tile of a block of threads made of them with the
// interface of RegisterTile (tile.h).
//
//   kind        A [M, K] B [K, N]   factors                                 sums
//   Tf32        16 x 8 x 8          rounded to 10 bits of fraction, away    float32
//   Float32     16 x 8 x 8          two of Tf32 each, 21 bits of fraction   float32, by three instructions
//   Bfloat16    16 x 16 x 8         rounded to 7 bits of fraction, even     float32
//   Float64     8 x 4 x 8           float64                                 float64
//
// A warp's lanes hold the elements as the PTX manual says, g = lane / 4 and t = lane % 4 (B stands with k down, n across):
//
//   Tf32      a = A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]     b = B[t, g], B[t + 4, g]     c = C[g, 2t], C[g, 2t + 1], C[g + 8, ...]
//   Float32   as Tf32
//   Bfloat16  the same of pairs: A[g, 2t .. 2t + 1], ..., A[g + 8, 2t + 8 ..]     B[2t .. 2t + 1, g], B[2t + 8 .., g]
//   Float64   a = A[g, t]     b = B[t, g]     c = C[g, 2t], C[g, 2t + 1]
//
// Panels in shared memory hold elements that are rounded already, each once, on its way from global memory: what is rounded when fragments are loaded
// is rounded by every warp that shares it, and bfloat16 would be read at twice its size. (So it comes through registers, a step ahead of what is
// multiplied; cp.async copies bytes and cannot round.) Float32 is taken apart when fragments are loaded, since its two parts would be twice the
// panel. A panel lies with K on the slow axis, rows Kind::kColumnPad apart from a multiple of 32, or with K on the fast axis and Kind::kRowPad: so
// every load of a fragment, by ldmatrix or word by word, meets each bank of a phase once:
//
//   words     address                        banks
//   Tf32      K slow: (32 i + 8) t + g       8 t + g: 32 different
//   Float64   K slow: (32 i + 4) t + g       pairs of banks 4 t + g of the 16 lanes of a half warp: 16 different; K fast (16 i ± 4) g + t likewise
//   ldmatrix  rows an odd multiple of 16 bytes apart: the 8 rows of a matrix start in 8 different groups of four banks
#pragma once

#include <cstring>

#include "kernels/cuda/vector.h"

#ifdef INFL_EMULATED_CUDA
#include "emulation/mma.h"
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "influence_ext: expected an architecture of 8.0 or later, whose tensor cores multiply tf32, bfloat16 and float64; leave out the older ones."
#endif

namespace infl::cuda::ptx {

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ inline uint32_t round_to_bfloat16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline uint16_t round_to_bfloat16(float x) { return static_cast<uint16_t>(round_to_bfloat16x2(x, 0.0f)); }

// Four matrices of 8 rows of 16 bytes: lane i gives the address of row i % 8 of matrix i / 8 and gets, of each, the pair t of row g, or where
// transposed the pair 2t, 2t + 1 of column g.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

// volatile, like ldmatrix: all lanes of a warp take part, so the compiler may neither move one behind a branch that only some lanes take nor leave it
// out where it sees that some do not use the result.
__device__ inline void multiply_tf32(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_bfloat16(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_float64(double& c0, double& c1, const double (&a)[1], const double (&b)[1]) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+d"(c0), "+d"(c1) : "d"(a[0]), "d"(b[0]));
}

}  // namespace infl::cuda::ptx
#endif

namespace infl::cuda {

// Of both kinds that sum in float32: a fragment of A and two of B are four matrices of 8 lines of 16 bytes.
template <class Element_, int kK_>
struct OfFloat32 {
  using Value = float;
  using Element = Element_;
  using Register = uint32_t;
  static constexpr int kLine = 16 / sizeof(Element);
  static constexpr int kM = 16, kK = kK_, kA = 4, kB = 2, kColumnPad = 8, kRowPad = kLine;

  // A from K fast, p[row * ld + k]; and B of 16 columns.
  __device__ static void load_left_fast(uint32_t (&a)[kA], const Element* p, int ld, int lane) {
    ptx::load_matrices<false>(a, p + lane % 16 * ld + lane / 16 * kLine);
  }
  __device__ static void load_right_fast(uint32_t (&b)[2][kB], const Element* p, int ld, int lane) {
    uint32_t all[4];
    ptx::load_matrices<false>(all, p + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * kLine);
    split(all, b);
  }

 protected:
  __device__ static void split(const uint32_t (&all)[4], uint32_t (&b)[2][kB]) {
    INFL_UNROLL(4)
    for (int i = 0; i < 2 * kB; ++i) b[i / 2][i % 2] = all[i];
  }
};

struct Tf32 : OfFloat32<uint32_t, 8> {
  template <int W>
  __device__ static Vector<Element, W> round(const Vector<float, W>& x) {
    Vector<Element, W> result;
    INFL_UNROLL(4)
    for (int i = 0; i < W; ++i) result.v[i] = ptx::round_to_tf32(x.v[i]);
    return result;
  }

  // From K slow, p[k * ld + row]: word by word, since ldmatrix transposes halves of words.
  __device__ static void load_left_slow(Element (&a)[kA], const Element* p, int ld, int lane) {
    p += lane % 4 * ld + lane / 4;
    INFL_UNROLL(4)
    for (int i = 0; i < kA; ++i) a[i] = p[i / 2 * 4 * ld + i % 2 * 8];
  }
  __device__ static void load_right_slow(Element (&b)[2][kB], const Element* p, int ld, int lane) {
    p += lane % 4 * ld + lane / 4;
    INFL_UNROLL(4)
    for (int i = 0; i < 2 * kB; ++i) b[i / 2][i % 2] = p[i % 2 * 4 * ld + i / 2 * 8];
  }

  // C += A B, C being the lane's atom of that number down its tile and its columns j and j + 1.
  template <int kRows, int kCols>
  __device__ static void multiply(float (&c)[kRows][kCols], int atom, int j, const Element (&a)[kA], const Element (&b)[kB]) {
    const int i = 2 * atom;
    ptx::multiply_tf32(c[i][j], c[i][j + 1], c[i + 1][j], c[i + 1][j + 1], a, b);
  }
};

// x is high + low, both of Tf32, up to 2⁻²² of itself, and x y the sum of three of the four products, the fourth being as small.
struct Float32 : OfFloat32<uint32_t, 8> {
  struct Register {
    uint32_t high, low;
  };

  template <int W>
  __device__ static Vector<Element, W> round(const Vector<float, W>& x) {
    Vector<Element, W> result;
    INFL_UNROLL(4)
    for (int i = 0; i < W; ++i) result.v[i] = ptx::bits_of(x.v[i]);
    return result;
  }

  __device__ static void load_left_fast(Register (&a)[kA], const Element* p, int ld, int lane) {
    Element whole[kA];
    Tf32::load_left_fast(whole, p, ld, lane);
    take_apart(whole, a);
  }
  __device__ static void load_left_slow(Register (&a)[kA], const Element* p, int ld, int lane) {
    Element whole[kA];
    Tf32::load_left_slow(whole, p, ld, lane);
    take_apart(whole, a);
  }
  __device__ static void load_right_fast(Register (&b)[2][kB], const Element* p, int ld, int lane) {
    Element whole[2][kB];
    Tf32::load_right_fast(whole, p, ld, lane);
    for (int i = 0; i < 2; ++i) take_apart(whole[i], b[i]);
  }
  __device__ static void load_right_slow(Register (&b)[2][kB], const Element* p, int ld, int lane) {
    Element whole[2][kB];
    Tf32::load_right_slow(whole, p, ld, lane);
    for (int i = 0; i < 2; ++i) take_apart(whole[i], b[i]);
  }

  // The smaller products first.
  template <int kRows, int kCols>
  __device__ static void multiply(float (&c)[kRows][kCols], int atom, int j, const Register (&a)[kA], const Register (&b)[kB]) {
    const uint32_t a_high[kA] = {a[0].high, a[1].high, a[2].high, a[3].high}, a_low[kA] = {a[0].low, a[1].low, a[2].low, a[3].low};
    const uint32_t b_high[kB] = {b[0].high, b[1].high}, b_low[kB] = {b[0].low, b[1].low};
    Tf32::multiply(c, atom, j, a_high, b_low);
    Tf32::multiply(c, atom, j, a_low, b_high);
    Tf32::multiply(c, atom, j, a_high, b_high);
  }

 private:
  template <int kCount>
  __device__ static void take_apart(const Element (&whole)[kCount], Register (&parts)[kCount]) {
    INFL_UNROLL(4)
    for (int i = 0; i < kCount; ++i) {
      const float x = ptx::float_of(whole[i]);
      const uint32_t high = ptx::round_to_tf32(x);
      parts[i] = {high, ptx::round_to_tf32(x - ptx::float_of(high & ~0x1fffu))};  // the instruction may leave anything in the other bits
    }
  }
};

struct Bfloat16 : OfFloat32<uint16_t, 16> {
  template <int W>
  __device__ static Vector<Element, W> round(const Vector<float, W>& x) {
    Vector<Element, W> result;
    if constexpr (W == 1) {
      result.v[0] = ptx::round_to_bfloat16(x.v[0]);
    } else {
      INFL_UNROLL(4)
      for (int i = 0; i < W; i += 2) {
        const uint32_t pair = ptx::round_to_bfloat16x2(x.v[i], x.v[i + 1]);
        result.v[i] = static_cast<uint16_t>(pair);
        result.v[i + 1] = static_cast<uint16_t>(pair >> 16);
      }
    }
    return result;
  }

  __device__ static void load_left_slow(uint32_t (&a)[kA], const Element* p, int ld, int lane) {
    ptx::load_matrices<true>(a, p + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
  }
  __device__ static void load_right_slow(uint32_t (&b)[2][kB], const Element* p, int ld, int lane) {
    uint32_t all[4];
    ptx::load_matrices<true>(all, p + lane % 16 * ld + lane / 16 * 8);
    split(all, b);
  }

  template <int kRows, int kCols>
  __device__ static void multiply(float (&c)[kRows][kCols], int atom, int j, const uint32_t (&a)[kA], const uint32_t (&b)[kB]) {
    const int i = 2 * atom;
    ptx::multiply_bfloat16(c[i][j], c[i][j + 1], c[i + 1][j], c[i + 1][j + 1], a, b);
  }
};

struct Float64 {
  using Value = double;
  using Element = double;
  using Register = double;
  static constexpr int kM = 8, kK = 4, kA = 1, kB = 1, kColumnPad = 4, kRowPad = 4;

  template <int W>
  __device__ static Vector<double, W> round(const Vector<double, W>& x) {
    return x;
  }

  __device__ static void load_left_slow(double (&a)[kA], const double* p, int ld, int lane) { a[0] = p[lane % 4 * ld + lane / 4]; }
  __device__ static void load_left_fast(double (&a)[kA], const double* p, int ld, int lane) { a[0] = p[lane / 4 * ld + lane % 4]; }
  __device__ static void load_right_slow(double (&b)[2][kB], const double* p, int ld, int lane) {
    p += lane % 4 * ld + lane / 4;
    b[0][0] = p[0];
    b[1][0] = p[8];
  }
  __device__ static void load_right_fast(double (&b)[2][kB], const double* p, int ld, int lane) {
    p += lane / 4 * ld + lane % 4;
    b[0][0] = p[0];
    b[1][0] = p[8 * ld];
  }

  template <int kRows, int kCols>
  __device__ static void multiply(double (&c)[kRows][kCols], int atom, int j, const double (&a)[kA], const double (&b)[kB]) {
    ptx::multiply_float64(c[atom][j], c[atom][j + 1], a, b);
  }
};

// A tile of C [kRows, kCols] of a block of kWarpsDown · kWarpsAcross warps. With m rows and n columns a warp, a step of kK costs m + n rows of a
// panel for m · n · kK multiplications: 32 by 16 read 12 words a lane for 4 instructions of Tf32, 64 by 32 read 24 for 16.
template <class Kind, int kRows_, int kCols_, int kWarpsDown, int kWarpsAcross>
struct MmaTile {
  using Value = typename Kind::Value;
  using Element = typename Kind::Element;
  static constexpr int kRows = kRows_, kCols = kCols_, kThreads = kWarp * kWarpsDown * kWarpsAcross;
  static constexpr int kOfWarpDown = kRows / kWarpsDown, kOfWarpAcross = kCols / kWarpsAcross;
  static constexpr int kTileRows = kOfWarpDown / 8, kTileCols = kOfWarpAcross / 4;
  static constexpr int kDown = kWarpsDown * 8;  // threads that share a column
  static constexpr int kWidth = 2;              // neighbouring columns of a thread
  static constexpr int kColumnPad = Kind::kColumnPad, kRowPad = Kind::kRowPad;
  static_assert(kOfWarpDown % Kind::kM == 0 && kOfWarpAcross % 16 == 0);

  Value sum[kTileRows][kTileCols];

  // Of the tile, the running thread's i-th row and j-th column, and its number among those that share a column.
  __device__ static int row(int i) { return first_row() + i * 8 + lane() / 4; }
  __device__ static int col(int j) { return first_col() + j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  __device__ static int down() { return warp() / kWarpsAcross * 8 + lane() / 4; }

  // Values as panels hold them.
  __device__ static Element element(Value value) { return Kind::round(Vector<Value, 1>{{value}}).v[0]; }
  template <int W>
  __device__ static Vector<Element, W> elements(const Vector<Value, W>& values) {
    return Kind::round(values);
  }

  __device__ void clear() {
    INFL_UNROLL(8)
    for (int i = 0; i < kTileRows; ++i) {
      INFL_UNROLL(8)
      for (int j = 0; j < kTileCols; ++j) sum[i][j] = Value(0);
    }
  }

  // sum += Aᵀ B over K steps of panels A [K, kRows] and B [K, kCols], rows lda and ldb elements apart.
  template <int K>
  __device__ void add(const Element* a, int lda, const Element* b, int ldb) {
    a += first_row();
    b += first_col();
    const int lane = MmaTile::lane();
    multiply<K>([=](auto& left, int k, int row) { Kind::load_left_slow(left, a + k * lda + row, lda, lane); },
                [=](auto& right, int k, int col) { Kind::load_right_slow(right, b + k * ldb + col, ldb, lane); });
  }

  // sum += A Bᵀ of panels A [kRows, K] and B [kCols, K].
  template <int K>
  __device__ void add_rows(const Element* a, int lda, const Element* b, int ldb) {
    a += first_row() * lda;
    b += first_col() * ldb;
    const int lane = MmaTile::lane();
    multiply<K>([=](auto& left, int k, int row) { Kind::load_left_fast(left, a + row * lda + k, lda, lane); },
                [=](auto& right, int k, int col) { Kind::load_right_fast(right, b + col * ldb + k, ldb, lane); });
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ static int first_row() { return warp() / kWarpsAcross * kOfWarpDown; }
  __device__ static int first_col() { return warp() % kWarpsAcross * kOfWarpAcross; }

  template <int K, class Left, class Right>
  __device__ void multiply(const Left& load_left, const Right& load_right) {
    constexpr int kAtomsDown = kOfWarpDown / Kind::kM, kPairsAcross = kOfWarpAcross / 16;
    static_assert(K % Kind::kK == 0);
    INFL_UNROLL(8)
    for (int k = 0; k < K; k += Kind::kK) {
      typename Kind::Register left[kAtomsDown][Kind::kA], right[kPairsAcross][2][Kind::kB];
      INFL_UNROLL(8)
      for (int i = 0; i < kAtomsDown; ++i) load_left(left[i], k, i * Kind::kM);
      INFL_UNROLL(8)
      for (int j = 0; j < kPairsAcross; ++j) load_right(right[j], k, j * 16);
      INFL_UNROLL(8)
      for (int i = 0; i < kAtomsDown; ++i) {
        INFL_UNROLL(8)
        for (int j = 0; j < 2 * kPairsAcross; ++j) Kind::multiply(sum, i, 2 * j, left[i], right[j / 2][j % 2]);
      }
    }
  }
};

}  // namespace infl::cuda
