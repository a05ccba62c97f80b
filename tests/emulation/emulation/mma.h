// The warp instructions that kernels/cuda/mma.h wraps, on a CPU: each lane gives its registers, and computes its part of the result from those that
// PTX says hold the elements, so a fragment that is laid out otherwise gives another product. tf32 and bfloat16 are rounded as the hardware rounds;
// sums are float32 or float64, one multiplication after the other, where the hardware's order and rounding are its own.
#pragma once

#include "emulation/cuda.h"

namespace infl::cuda::ptx {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// cvt.rna.tf32.f32: 10 bits of fraction, ties away from zero.
inline uint32_t round_to_tf32(float x) { return x != x ? 0x7fffffffu : (bits_of(x) + 0x1000u) & ~0x1fffu; }

// cvt.rn.bf16x2.f32: 7 bits of fraction, ties to even.
inline uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline uint32_t round_to_bfloat16x2(float low, float high) { return round_to_bfloat16(low) | uint32_t{round_to_bfloat16(high)} << 16; }

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix: expected rows at multiples of 16 bytes");
  const emulation::Given* rows = emulation::gather(&row, sizeof(row));
  const int lane = emulation::lane(), group = lane / 4, in_group = lane % 4;
  for (int m = 0; m < 4; ++m) {
    for (int half = 0; half < 2; ++half) {
      const int i = kTransposed ? in_group * 2 + half : group, j = kTransposed ? group : in_group * 2 + half;
      const unsigned char* from;
      std::memcpy(&from, rows[m * 8 + i].bytes, sizeof(from));
      std::memcpy(reinterpret_cast<unsigned char*>(&to[m]) + 2 * half, from + 2 * j, 2);
    }
  }
}

// The registers of the factors that all lanes give.
template <class Register, int kA, int kB>
class Factors {
 public:
  Factors(const Register (&a)[kA], const Register (&b)[kB]) {
    unsigned char own[sizeof(a) + sizeof(b)];
    std::memcpy(own, a, sizeof(a));
    std::memcpy(own + sizeof(a), b, sizeof(b));
    given_ = emulation::gather(own, sizeof(own));
  }
  Register a(int lane, int i) const { return read(lane, i); }
  Register b(int lane, int i) const { return read(lane, kA + i); }

 private:
  Register read(int lane, int i) const {
    Register value;
    std::memcpy(&value, given_[lane].bytes + i * sizeof(Register), sizeof(Register));
    return value;
  }
  const emulation::Given* given_;
};

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
inline void multiply_tf32(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Factors all(a, b);
  const int group = emulation::lane() / 4, col = emulation::lane() % 4 * 2;
  const auto value = [](uint32_t bits) { return float_of(bits & ~0x1fffu); };  // the other bits are ignored
  float* const c[4] = {&c0, &c1, &c2, &c3};
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 8; ++k) {
      *c[i] += value(all.a(group * 4 + k % 4, i / 2 + k / 4 * 2)) * value(all.b((col + i % 2) * 4 + k % 4, k / 4));
    }
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
inline void multiply_bfloat16(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Factors all(a, b);
  const int group = emulation::lane() / 4, col = emulation::lane() % 4 * 2;
  const auto value = [](uint32_t pair, int half) { return float_of(half == 0 ? pair << 16 : pair & 0xffff0000u); };
  float* const c[4] = {&c0, &c1, &c2, &c3};
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      *c[i] += value(all.a(group * 4 + k % 8 / 2, i / 2 + k / 8 * 2), k % 2) * value(all.b((col + i % 2) * 4 + k % 8 / 2, k / 8), k % 2);
    }
  }
}

// mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64
inline void multiply_float64(double& c0, double& c1, const double (&a)[1], const double (&b)[1]) {
  const Factors all(a, b);
  const int group = emulation::lane() / 4, col = emulation::lane() % 4 * 2;
  double* const c[2] = {&c0, &c1};
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k) *c[i] += all.a(group * 4 + k, 0) * all.b((col + i) * 4 + k, 0);
  }
}

}  // namespace infl::cuda::ptx
