// Head norm and rotation, on the way into the cache.
#pragma once
#include "kernels.h"
#include "rows.h"

namespace tars::TARS_ISA {

// A vector in 8 bits: a scale, so that the largest magnitude becomes 127, and codes rounded to nearest even. What is not finite makes the
// scale NaN.
static void store_i8(const float* x, int64_t dim, char* out) {
  int32_t top_bits = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int32_t bits;
    std::memcpy(&bits, x + d, 4);
    bits &= 0x7fffffff;  // as integers these order like the floats, NaN above all
    top_bits = bits > top_bits ? bits : top_bits;
  }
  float top;
  std::memcpy(&top, &top_bits, 4);
  const bool finite = top_bits < 0x7f800000;
  const float scale = finite ? top / 127.0f : __builtin_nanf("");
  std::memcpy(out, &scale, sizeof scale);
  const Floats inverse = splat(finite && top >= 1e-36f ? 127.0f / top : 0.0f), magic = splat(12582912.0f);
  for (int64_t d = 0; d < dim; d += kLanes) {
    int8_t codes[kLanes];
    const Floats scaled = finite ? load(x + d) * inverse : splat(0.0f);
    store_bytes(codes, as_ints(scaled + magic) - splat(0x4b400000));
    std::memcpy(out + cache_offset(DType::kI8) + d, codes, dim - d < kLanes ? dim - d : kLanes);
  }
}

// What most models have: float32 heads of whole vectors, without a norm.
TARS_INLINE void rotate_vectors(const RotateTask& t, int64_t token, const float* x, char* out, DType out_type) {
  const float *cos = t.cos + token * t.half, *sin = t.sin + token * t.half;
  const int64_t size = size_of(out_type);
  for (int64_t i = 0; i < t.half; i += kLanes) {
    const Floats a = load(x + i), b = load(x + t.half + i), c = load(cos + i), s = load(sin + i);
    store_as(out_type, out + i * size, a * c - b * s);
    store_as(out_type, out + (t.half + i) * size, b * c + a * s);
  }
  for (int64_t d = 2 * t.half; d < t.head_dim; d += kLanes) store_as(out_type, out + d * size, load(x + d));
}

// Norms and rotates one head of one token; dimension i pairs with i + half, the rest passes through.
static void rotate(const RotateTask& t, int64_t token, int64_t head, void* out, DType out_type) {
  const char* in = static_cast<const char*>(t.in) + (token * t.heads + head) * t.head_dim * size_of(t.type);
  if (t.type == DType::kF32 && !t.norm && t.half % kLanes == 0 && t.head_dim % kLanes == 0 && out_type != DType::kI8)
    return rotate_vectors(t, token, reinterpret_cast<const float*>(in), static_cast<char*>(out), out_type);
  float x[kMaxHeadDim + kGroup];
  read_row(in, t.type, t.head_dim, t.norm, t.eps, x);
  const float *cos = t.cos + token * t.half, *sin = t.sin + token * t.half;
  for (int64_t i = 0; i < t.half; i += kLanes) {
    const int lanes = static_cast<int>(t.half - i < kLanes ? t.half - i : kLanes);
    const Floats a = load_some(DType::kF32, x + i, lanes), b = load_some(DType::kF32, x + t.half + i, lanes);
    const Floats c = load_some(DType::kF32, cos + i, lanes), s = load_some(DType::kF32, sin + i, lanes);
    store_some(DType::kF32, x + i, a * c - b * s, lanes);
    store_some(DType::kF32, x + t.half + i, b * c + a * s, lanes);
  }
  if (out_type == DType::kI8) return store_i8(x, t.head_dim, static_cast<char*>(out));
  for (int64_t d = 0; d < t.head_dim; d += kLanes) {
    const int lanes = static_cast<int>(t.head_dim - d < kLanes ? t.head_dim - d : kLanes);
    store_some(out_type, static_cast<char*>(out) + d * size_of(out_type), load(x + d), lanes);
  }
}

}  // namespace tars::TARS_ISA
