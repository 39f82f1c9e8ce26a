// Activation rows: normalised, quantised or spread into panels before a product; biased, activated and stored after it.
#pragma once
#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace tars::TARS_ISA {

// Row of `inputs` numbers, RMS-normalised if `norm` is given, as float32 padded with zeros to a multiple of 32.
static void read_row(const void* x, DType type, int64_t inputs, const float* norm, float eps, float* out) {
  const char* in = static_cast<const char*>(x);
  const int64_t padded = ceil_div(inputs, kGroup) * kGroup, whole = inputs / kLanes * kLanes;
  Floats squares = splat(0.0f);
  for (int64_t k = 0; k < padded; k += kLanes) {
    Floats v = splat(0.0f);
    if (k < whole) v = load_as(type, in + k * size_of(type));
    else if (k < inputs) v = load_some(type, in + k * size_of(type), static_cast<int>(inputs - k));
    squares = fma(v, v, squares);
    store(out + k, v);
  }
  if (!norm) return;
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(inputs) + eps);
  for (int64_t k = 0; k < padded; k += kLanes) {
    Floats w = k < whole ? load(norm + k) : k < inputs ? load_some(DType::kF32, norm + k, static_cast<int>(inputs - k)) : splat(0.0f);
    store(out + k, load(out + k) * splat(scale) * w);
  }
}

struct CodeSums {
  int32_t low, high;  // of the first and the last 16 codes
};

// The low bytes of 32 numbers, and their sums.
TARS_INLINE CodeSums store_codes(int8_t* out, Ints low, Ints high) {
#if defined(__AVX512VNNI__)
  const __m256i codes = _mm256_set_m128i(_mm512_cvtepi32_epi8((__m512i)high.part[0]), _mm512_cvtepi32_epi8((__m512i)low.part[0]));
  _mm256_storeu_si256((__m256i*)out, codes);
  __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), codes);
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0x4e));
  sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32(sums, 0xb1));
  return {_mm256_cvtsi256_si32(sums), _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1))};
#else
  store_bytes(out, low);
  store_bytes(out + kLanes, high);
  return {sum(low), sum(high)};
#endif
}

// Round to nearest even after scaling so that the largest magnitude becomes 127. A group that holds a NaN or an infinity gets a NaN scale,
// so its row's outputs are NaN.
TARS_INLINE void quantize_group(const float* x, ActivationGroup* out) {
  Floats a = load(x), b = load(x + kLanes);
  const Ints magnitude = splat(0x7fffffff);
  Ints u = as_ints(a) & magnitude, v = as_ints(b) & magnitude;  // as integers these order like the floats, NaN above all
  int32_t top_bits = max_of(select(less(u, v), v, u));
  if (top_bits >= 0x7f800000) {
    std::memset(out, 0, sizeof *out);
    out->scale = out->sum = __builtin_nanf("");
    return;
  }
  float top;
  std::memcpy(&top, &top_bits, 4);
  const float inverse = top < 1e-36f ? 0.0f : 127.0f / top;
  const Floats magic = splat(12582912.0f);
  const Ints magic_bits = splat(0x4b400000);
  Ints low = as_ints(a * splat(inverse) + magic) - magic_bits, high = as_ints(b * splat(inverse) + magic) - magic_bits;
  const CodeSums sums = store_codes(out->codes, low, high);
  out->scale = top / 127.0f;
  out->sum = out->scale * static_cast<float>(sums.low + sums.high);
  out->minus8 = -8 * (sums.low + sums.high);
  out->minus8_low = -8 * sums.low;
}

static void fill_panel(const float* x, int64_t inputs, int row, const PanelBuffers& out) {
  const int64_t groups = ceil_div(inputs, kGroup);
  if (out.groups)
    for (int64_t g = 0; g < groups; ++g) quantize_group(x + g * kGroup, out.groups + g * kPanel + row);
  if (out.floats)
    for (int64_t k = 0; k < inputs + inputs % 2; ++k) out.floats[k * kPanel + row] = x[k];
  if (out.pairs) {
    for (int64_t k = 0; k < inputs; k += kLanes) {
      int32_t bits[kLanes];
      store(bits, round_bf16(load(x + k)));
      for (int i = 0; i < kLanes && k + i < inputs; i += 2)
        out.pairs[(k + i) / 2 * kPanel + row] = static_cast<uint32_t>(bits[i]) | static_cast<uint32_t>(bits[i + 1]) << 16;
    }
  }
}

// Abramowitz and Stegun 7.1.26, error below 1.5e-7.
TARS_INLINE Floats erf(Floats x) {
  Ints sign = as_ints(x) & splat(static_cast<int32_t>(0x80000000));
  Floats a = as_floats(as_ints(x) & splat(0x7fffffff));
  Floats t = splat(1.0f) / fma(a, splat(0.3275911f), splat(1.0f));
  Floats p = fma(t, splat(1.061405429f), splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  Floats y = splat(1.0f) - p * t * exp(splat(0.0f) - a * a);
  return as_floats(as_ints(y) | sign);
}

TARS_INLINE Floats activate(Activation kind, Floats x) {
  switch (kind) {
    case Activation::kSilu: return x / (splat(1.0f) + exp(splat(0.0f) - x));
    case Activation::kGelu: return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f)));
    case Activation::kGeluTanh: return splat(0.5f) * x * (splat(1.0f) + tanh(splat(0.79788456f) * fma(splat(0.044715f) * x, x * x, x)));
    case Activation::kRelu: return select(less(x, splat(0.0f)), splat(0.0f), x);
    default: return x;
  }
}

// A tile's sums for some rows [rows][16] to the output matrix: bias, activation, times `other` (a gated product), plus residual.
static void finish_tile(const Finish& f, const float* sums, const float* other, int rows, int lanes, int64_t row, int64_t column) {
  Floats bias = splat(0.0f), other_bias = splat(0.0f);
  if (f.bias) bias = load_some(DType::kF32, f.bias + column, lanes);
  if (f.other_bias) other_bias = load_some(DType::kF32, f.other_bias + column, lanes);
  const int64_t in_size = size_of(f.residual_type), out_size = size_of(f.out_type);
  for (int r = 0; r < rows; ++r) {
    Floats y = activate(f.activation, load(sums + r * kLanes) + bias);
    if (other) y = y * (load(other + r * kLanes) + other_bias);
    const int64_t at = (row + r) * f.outputs + column;
    if (f.residual) {
      const char* p = static_cast<const char*>(f.residual) + at * in_size;
      y = y + load_some(f.residual_type, p, lanes);
    }
    store_some(f.out_type, static_cast<char*>(f.out) + at * out_size, y, lanes);
  }
}

}  // namespace tars::TARS_ISA
