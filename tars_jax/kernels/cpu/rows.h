// Activation rows: normalised, quantised or spread into panels before a product; biased, activated and stored after it.
#pragma once
#include <algorithm>
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

// The activations' part of what the minima add: the sum over one weight group.
template <int kHalves>
TARS_INLINE float group_sum(const ActivationGroup& x, int half) {
  if constexpr (kHalves == 1) return x.sum;
  float low = static_cast<float>(x.minus8_low) * -0.125f * x.scale;
  return half == 0 ? low : x.sum - low;
}

static void fill_tile(const float* x, int row, ActivationTile* out) {
  ActivationGroup group;
  quantize_group(x, &group);
  std::memcpy(out->codes[row], group.codes, sizeof group.codes);
  out->scale[row] = group.scale;
  out->sums[0][row] = group.sum;
  out->sums[1][row] = group_sum<2>(group, 0);
  out->sums[2][row] = group_sum<2>(group, 1);
}

static void clear_in_tile(int row, ActivationTile* out) {
  std::memset(out->codes[row], 0, kGroup);
  out->scale[row] = 0.0f;
  for (float (&sums)[16] : out->sums) sums[row] = 0.0f;
}

// Bfloat16 of a row, padded with zeros, as a panel holds them.
TARS_INLINE void fill_pairs(const float* x, int64_t inputs, int row, uint32_t* out) {
#if defined(__AMX_TILE__)
  for (int64_t k = 0; k < inputs; k += kGroup) store_pairs(out + (k / 2 * kPanel + row * kLanes), load(x + k), load(x + k + kLanes));
#else
  for (int64_t k = 0; k < inputs; k += kLanes) {
    int32_t bits[kLanes];
    store(bits, round_bf16(load(x + k)));
    for (int i = 0; i < kLanes && k + i < inputs; i += 2)
      out[(k + i) / 2 * kPanel + row] = static_cast<uint32_t>(bits[i]) | static_cast<uint32_t>(bits[i + 1]) << 16;
  }
#endif
}

// 16 numbers of a row, from `column` on, to the pairs of its panel among others of `columns` numbers a row.
TARS_INLINE void store_in_panel([[maybe_unused]] void* panels, int64_t columns, int64_t row, int64_t column, [[maybe_unused]] Floats x) {
  const int64_t panel = row / kPanel * (columns / 2 * kPanel), group = column / kGroup * (kPanel * kLanes);
  [[maybe_unused]] const int64_t at = panel + group + row % kPanel * kLanes + column % kGroup / 2;
#if defined(__AMX_TILE__)
  store_half_pairs(static_cast<uint32_t*>(panels) + at, x);
#endif
}

static void fill_panel(const float* x, int64_t inputs, int row, const PanelBuffers& out) {
  const int64_t groups = ceil_div(inputs, kGroup);
  if (out.groups)
    for (int64_t g = 0; g < groups; ++g) quantize_group(x + g * kGroup, out.groups + g * kPanel + row);
  if (out.tiles) {
    for (int64_t g = 0; g < groups; ++g) fill_tile(x + g * kGroup, row, out.tiles + g);
    if (groups % 2) clear_in_tile(row, out.tiles + groups);
  }
  if (out.floats)
    for (int64_t k = 0; k < inputs + inputs % 2; ++k) out.floats[k * kPanel + row] = x[k];
  if (out.pairs) fill_pairs(x, inputs, row, out.pairs);
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

// Scalar products of x and `count` rows of b.
template <int count>
TARS_INLINE void dots(const float* x, const float* b, int64_t inputs, float* out) {
  Floats sums[count];
  for (int i = 0; i < count; ++i) sums[i] = splat(0.0f);
  const int64_t whole = inputs / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    const Floats v = load(x + k);
    for (int i = 0; i < count; ++i) sums[i] = fma(v, load(b + i * inputs + k), sums[i]);
  }
  const int rest = static_cast<int>(inputs - whole);
  for (int i = 0; i < count; ++i) {
    if (rest) sums[i] = fma(load_some(DType::kF32, x + whole, rest), load_some(DType::kF32, b + i * inputs + whole, rest), sums[i]);
    out[i] = sum(sums[i]);
  }
}

// Ranks whose scale is 0, such as those of adapters that a row does not use, cost nothing and stay 0.
static void project(const LowRank& update, const float* x, int64_t inputs, int64_t row, float* out) {
  constexpr int64_t kAtOnce = 4;
  const float* b = update.b.of(row);
  for (int64_t first = 0; first < update.ranks; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, update.ranks - first);
    float scales[kAtOnce] = {};
    for (int64_t i = 0; i < count; ++i) scales[i] = update.scale[row * update.scale_row + (first + i) * update.scale_rank];
    float* found = out + first;
    if (std::all_of(scales, scales + kAtOnce, [](float scale) { return scale != 0.0f; })) {
      dots<kAtOnce>(x, b + first * inputs, inputs, found);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        found[i] = 0.0f;
        if (scales[i] != 0.0f) dots<1>(x, b + (first + i) * inputs, inputs, found + i);
      }
    }
    for (int64_t i = 0; i < count; ++i) found[i] *= scales[i];
  }
}

static void add_update(const LowRank& update, const float* projected, int64_t step, int rows, int lanes, int64_t row, int64_t column, float* sums) {
  const int64_t outputs = update.a.size / update.ranks;
  for (int r = 0; r < rows;) {
    const float* a = update.a.of(row + r) + column;
    for (const int end = static_cast<int>(std::min<int64_t>(rows, r + update.a.left(row + r))); r < end; ++r) {
      Floats y = load(sums + r * kLanes);
      for (int64_t rank = 0; rank < update.ranks; ++rank) {
        const float factor = projected[r * step + rank];
        if (factor != 0.0f) y = fma(splat(factor), load_some(DType::kF32, a + rank * outputs, lanes), y);
      }
      store(sums + r * kLanes, y);
    }
  }
}

TARS_INLINE Floats bias_of(const RunFloats& biases, int64_t row, int64_t column, int lanes) {
  return biases.data ? load_some(DType::kF32, biases.of(row) + column, lanes) : splat(0.0f);
}

// A tile's sums for some rows [rows][16] to the output matrix: bias, activation, times `other` (a gated product), plus residual.
static void finish_tile(const Finish& f, const float* sums, const float* other, int rows, int lanes, int64_t row, int64_t column) {
  const int64_t in_size = size_of(f.residual_type), out_size = size_of(f.out_type);
  for (int r = 0; r < rows;) {
    const Floats bias = bias_of(f.bias, row + r, column, lanes), other_bias = bias_of(f.other_bias, row + r, column, lanes);
    const int64_t shared = std::min(f.bias.left(row + r), f.other_bias.left(row + r));
    for (const int end = static_cast<int>(std::min<int64_t>(rows, r + shared)); r < end; ++r) {
      Floats y = activate(f.activation, load(sums + r * kLanes) + bias);
      if (other) y = y * (load(other + r * kLanes) + other_bias);
      const int64_t at = (row + r) * f.outputs + column;
      if (f.residual) y = y + load_some(f.residual_type, static_cast<const char*>(f.residual) + at * in_size, lanes);
      if (f.pairs) store_in_panel(f.out, f.outputs, row + r, column, y);
      else store_some(f.out_type, static_cast<char*>(f.out) + at * out_size, y, lanes);
    }
  }
}

}  // namespace tars::TARS_ISA
