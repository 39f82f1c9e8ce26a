// Sixteen-lane vectors on whatever the instruction set of this translation unit offers: one 512-bit register, two of 256 bits, four of 128.
//
// Everything here and in the files that include it lives in the namespace TARS_ISA, which each of isa_*.cc defines differently: the same
// source is compiled once per instruction set and must not be merged by the linker.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "format.h"

#if defined(__AVX512F__)
#define TARS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TARS_VECTOR_BYTES 32
#else
#define TARS_VECTOR_BYTES 16
#endif
#if !defined(TARS_PANEL)
#define TARS_PANEL 8  // what fits in registers beside its accumulators
#endif
#define TARS_INLINE static inline __attribute__((always_inline))
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
#define TARS_UNROLL _Pragma("GCC unroll 8")
#else
#define TARS_UNROLL  // nothing lives in registers there anyway; the compiler takes many minutes over the unrolled form
#endif
#define TARS_EACH_PART(i) _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

namespace tars::TARS_ISA {

constexpr int kParts = 64 / TARS_VECTOR_BYTES;
constexpr int kPartLanes = kLanes / kParts;
constexpr int kPanel = TARS_PANEL;
constexpr int kRowBlock = kParts == 1 ? 8 : 2;  // accumulators that fit in 32 or in 16 registers

typedef float FloatPart __attribute__((vector_size(TARS_VECTOR_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(TARS_VECTOR_BYTES)));

struct Floats {
  FloatPart part[kParts];
};
struct Ints {  // also 64 bytes of codes
  IntPart part[kParts];
};

TARS_INLINE Floats splat(float x) {
  Floats r;
  TARS_EACH_PART(i) r.part[i] = x - FloatPart{};
  return r;
}
TARS_INLINE Ints splat(int32_t x) {
  Ints r;
  TARS_EACH_PART(i) r.part[i] = x - IntPart{};
  return r;
}
// Part by part: of 64 bytes at once GCC makes copies in quarters through the stack, which then stall every load from it.
template <class V>
TARS_INLINE V load_parts(const void* p) {
  V r;
  TARS_EACH_PART(i) std::memcpy(&r.part[i], static_cast<const char*>(p) + i * TARS_VECTOR_BYTES, TARS_VECTOR_BYTES);
  return r;
}
template <class V>
TARS_INLINE void store_parts(void* p, const V& a) {
  TARS_EACH_PART(i) std::memcpy(static_cast<char*>(p) + i * TARS_VECTOR_BYTES, &a.part[i], TARS_VECTOR_BYTES);
}
TARS_INLINE Floats load(const float* p) { return load_parts<Floats>(p); }
TARS_INLINE Ints load_ints(const void* p) { return load_parts<Ints>(p); }
TARS_INLINE void store(float* p, Floats a) { store_parts(p, a); }
TARS_INLINE void store(int32_t* p, Ints a) { store_parts(p, a); }

#define TARS_BINARY(V, op)                                   \
  TARS_INLINE V operator op(V a, V b) {                      \
    TARS_EACH_PART(i) a.part[i] = a.part[i] op b.part[i];    \
    return a;                                                \
  }
TARS_BINARY(Floats, +)
TARS_BINARY(Floats, -)
TARS_BINARY(Floats, *)
TARS_BINARY(Floats, /)
TARS_BINARY(Ints, +)
TARS_BINARY(Ints, -)
TARS_BINARY(Ints, *)
TARS_BINARY(Ints, &)
TARS_BINARY(Ints, |)
TARS_BINARY(Ints, ^)
#undef TARS_BINARY

// a * b + c, rounded once where there is an instruction for it. The compiler itself is told to fuse nothing: it would do so here and
// not there, and the same sum would come out differently in two places.
TARS_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  c.part[0] = (FloatPart)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(__AVX2__)
  TARS_EACH_PART(i) c.part[i] = (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
  TARS_EACH_PART(i) c.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  return c;
}
template <int N>
TARS_INLINE Ints shift_left(Ints a) {
  TARS_EACH_PART(i) a.part[i] = a.part[i] << N;
  return a;
}
template <int N>
TARS_INLINE Ints shift_right(Ints a) {  // arithmetic
  TARS_EACH_PART(i) a.part[i] = a.part[i] >> N;
  return a;
}
TARS_INLINE Ints shift(Ints a, int left) {  // arithmetic; to the right if negative
  TARS_EACH_PART(i) a.part[i] = left >= 0 ? a.part[i] << left : a.part[i] >> -left;
  return a;
}
TARS_INLINE Floats to_floats(Ints a) {
  Floats r;
  TARS_EACH_PART(i) r.part[i] = __builtin_convertvector(a.part[i], FloatPart);
  return r;
}
TARS_INLINE Floats as_floats(Ints a) {
  Floats r;
  TARS_EACH_PART(i) r.part[i] = (FloatPart)a.part[i];
  return r;
}
TARS_INLINE Ints as_ints(Floats a) {
  Ints r;
  TARS_EACH_PART(i) r.part[i] = (IntPart)a.part[i];
  return r;
}
// Lanes of -1 where a < b, else 0; a NaN compares false.
TARS_INLINE Ints less(Floats a, Floats b) {
  Ints r;
  TARS_EACH_PART(i) r.part[i] = a.part[i] < b.part[i];
  return r;
}
TARS_INLINE Ints less(Ints a, Ints b) {
  Ints r;
  TARS_EACH_PART(i) r.part[i] = a.part[i] < b.part[i];
  return r;
}
TARS_INLINE Floats select(Ints mask, Floats a, Floats b) {
  TARS_EACH_PART(i) a.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return a;
}
TARS_INLINE Ints select(Ints mask, Ints a, Ints b) {
  TARS_EACH_PART(i) a.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return a;
}
TARS_INLINE Floats max(Floats a, Floats b) {
  TARS_EACH_PART(i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}
TARS_INLINE Ints iota() {
  Ints r;
  for (int i = 0; i < kLanes; ++i) r.part[i / kPartLanes][i % kPartLanes] = i;
  return r;
}

// The one order in which 16 numbers are added: lanes 0+2 and 1+3 of each four, then these, then the fours in pairs.
template <class T>
TARS_INLINE T sum_in_order(const T* x) {
  T four[4];
  for (int i = 0; i < 4; ++i) four[i] = (x[4 * i] + x[4 * i + 2]) + (x[4 * i + 1] + x[4 * i + 3]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}
TARS_INLINE float sum(Floats a) {
#if defined(__AVX512F__)
  __m512 x = (__m512)a.part[0];
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
  return _mm512_cvtss_f32(x);
#elif defined(__AVX2__)
  float pair[kParts];
  TARS_EACH_PART(i) {
    __m256 x = (__m256)a.part[i];
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0x4e));
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0xb1));
    pair[i] = _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  return pair[0] + pair[1];
#else
  float x[kLanes];
  store(x, a);
  return sum_in_order(x);
#endif
}
TARS_INLINE int32_t sum(Ints a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)a.part[0]);
#elif defined(__AVX2__)
  const __m256i both = _mm256_add_epi32((__m256i)a.part[0], (__m256i)a.part[1]);
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
#else
  int32_t x[kLanes], total = 0;
  store(x, a);
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}
// Rows and columns of 16 vectors exchanged.
TARS_INLINE void transpose16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  TARS_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {  // columns 2h and 2h + 1 of each four
      const __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + 2 + h]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int c = 0; c < 4; ++c) {  // column c of each four, of the rows four by four
    const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * out_stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (4 + c) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (8 + c) * out_stride, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + (12 + c) * out_stride, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}
TARS_INLINE float max_of(Floats a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a.part[0]);
#elif defined(__AVX2__)
  const __m256 both = _mm256_max_ps((__m256)a.part[0], (__m256)a.part[1]);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  x = _mm_max_ps(x, _mm_permute_ps(x, 0x4e));
  return _mm_cvtss_f32(_mm_max_ps(x, _mm_permute_ps(x, 0xb1)));
#else
  float x[kLanes];
  store(x, a);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
#endif
}
TARS_INLINE int32_t max_of(Ints a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)a.part[0]);
#elif defined(__AVX2__)
  const __m256i both = _mm256_max_epi32((__m256i)a.part[0], (__m256i)a.part[1]);
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
#else
  int32_t x[kLanes];
  store(x, a);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
#endif
}

// The low byte of each lane.
TARS_INLINE void store_bytes(int8_t* p, Ints a) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)a.part[0]));
#elif defined(__AVX2__)
  const Ints bytes = a & splat(255);
  const __m256i halves = _mm256_packus_epi32((__m256i)bytes.part[0], (__m256i)bytes.part[1]);  // of both parts, 4 and 4
  const __m256i in_order = _mm256_permute4x64_epi64(halves, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1)));
#else
  int32_t x[kLanes];
  store(x, a);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
#endif
}

// 16 half-width numbers, widened. The portable float16 path never
// forms a float32 denormal: XLA's threads flush those to zero.
TARS_INLINE Ints widen_u16(const void* p) {
  Ints r;
#if defined(__AVX512F__)
  r.part[0] = (IntPart)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  TARS_EACH_PART(i) r.part[i] = (IntPart)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + i));
#else
  uint16_t x[kLanes];
  std::memcpy(x, p, sizeof x);
  for (int i = 0; i < kLanes; ++i) r.part[i / kPartLanes][i % kPartLanes] = x[i];
#endif
  return r;
}
TARS_INLINE Floats load_f16(const void* p) {
#if defined(__AVX512F__)
  return {{(FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}};
#elif defined(__AVX2__)
  const __m128i* q = (const __m128i*)p;
  return {{(FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(q)), (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(q + 1))}};
#else
  const Ints bits = widen_u16(p), magnitude = shift_left<13>(bits & splat(0x7fff)), exponent = magnitude & splat(0x7c00 << 13);
  const Ints normal = magnitude + splat(112 << 23), special = normal + splat(112 << 23);
  const Floats tiny = as_floats(magnitude + splat(113 << 23)) - splat(0x1p-14f);
  Ints value = select(less(exponent, splat(1)), as_ints(tiny), normal);
  value = select(less(splat(0x7bff << 13), exponent), special, value);  // infinities and NaNs
  return as_floats(value | shift_left<16>(bits & splat(0x8000)));
#endif
}
TARS_INLINE Floats load_bf16(const void* p) { return as_floats(shift_left<16>(widen_u16(p))); }

// float32 bits rounded to bfloat16 (to nearest, ties to even), in the low half of each lane; NaN stays NaN.
TARS_INLINE Ints round_bf16(Floats a) {
  Ints bits = as_ints(a);
  Ints odd = shift_right<16>(bits) & splat(1);
  Ints rounded = shift_right<16>(bits + splat(0x7fff) + odd) & splat(0xffff);
  Ints nan = less(splat(0x7f800000), bits & splat(0x7fffffff));
  return select(nan, splat(0x7fc0), rounded);
}

// Neighbours as the two bfloat16 of an element; `dot_pairs` adds the products of two such.
TARS_INLINE Floats pair_bf16(Floats low, Floats high) { return as_floats(round_bf16(low) | shift_left<16>(round_bf16(high))); }

#if defined(__AVX512F__)
inline bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }
TARS_INLINE Floats dot_pairs(Floats a, Floats b, Floats sum) {
  __m512 out = (__m512)sum.part[0];
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(out) : "v"((__m512)a.part[0]), "v"((__m512)b.part[0]));  // an intrinsic would ask for its own target
  return {{(FloatPart)out}};
}
#endif

inline uint16_t to_f16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // denormal: let the adder round at the right place
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    std::memcpy(&magnitude, &value, 4);
    return sign | (magnitude - 0x3f000000);
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return sign | ((magnitude + 0xc8000fff + odd) >> 13);
}

TARS_INLINE void store_f16(void* p, Floats a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  TARS_EACH_PART(i) _mm_storeu_si128((__m128i*)p + i, _mm256_cvtps_ph((__m256)a.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
  float x[kLanes];
  uint16_t y[kLanes];
  store(x, a);
  for (int i = 0; i < kLanes; ++i) y[i] = to_f16_bits(x[i]);
  std::memcpy(p, y, sizeof y);
#endif
}
#if defined(__AVX512BF16__)
// 32 numbers as bfloat16; tiny ones become zero, as the products would have them.
TARS_INLINE void store_pairs(void* p, Floats low, Floats high) {
  const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)high.part[0], (__m512)low.part[0]);
  std::memcpy(p, &pairs, sizeof pairs);
}
TARS_INLINE void store_half_pairs(void* p, Floats a) {
  const __m256bh pairs = _mm512_cvtneps_pbh((__m512)a.part[0]);
  std::memcpy(p, &pairs, sizeof pairs);
}
#endif
TARS_INLINE void store_bf16(void* p, Floats a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)round_bf16(a).part[0]));
#else
  int32_t x[kLanes];
  uint16_t y[kLanes];
  store(x, round_bf16(a));
  for (int i = 0; i < kLanes; ++i) y[i] = static_cast<uint16_t>(x[i]);
  std::memcpy(p, y, sizeof y);
#endif
}

TARS_INLINE Floats load_i8(const void* p) {
  int8_t x[kLanes];
  int32_t y[kLanes];
  std::memcpy(x, p, sizeof x);
  for (int i = 0; i < kLanes; ++i) y[i] = x[i];
  return to_floats(load_ints(y));
}

TARS_INLINE Floats load_as(DType type, const void* p) {
  switch (type) {
    case DType::kI8: return load_i8(p);
    case DType::kF16: return load_f16(p);
    case DType::kBF16: return load_bf16(p);
    default: return load(static_cast<const float*>(p));
  }
}
TARS_INLINE void store_as(DType type, void* p, Floats a) {
  switch (type) {
    case DType::kF16: return store_f16(p, a);
    case DType::kBF16: return store_bf16(p, a);
    default: return store(static_cast<float*>(p), a);
  }
}
// The first n <= 16 numbers; the rest is zero and its memory is not touched.
TARS_INLINE Floats load_some(DType type, const void* p, int n) {
  if (n == kLanes) return load_as(type, p);
  char buffer[sizeof(Floats)] = {};
  std::memcpy(buffer, p, n * size_of(type));
  return load_as(type, buffer);
}
TARS_INLINE void store_some(DType type, void* p, Floats a, int n) {
  if (n == kLanes) return store_as(type, p, a);
  char buffer[sizeof(Floats)];
  store_as(type, buffer, a);
  std::memcpy(p, buffer, n * size_of(type));
}

// e**x to about 2 ulp (Cephes' polynomial) for x of at most 0; underflows to 0, keeps NaN.
TARS_INLINE Floats exp_of_negative(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer in the low bits
  Floats shifted = fma(x, splat(1.44269504f), magic);
  Floats n = shifted - magic;
  Floats r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  Floats power = as_floats(shift_left<23>(as_ints(shifted) + splat(127)));  // 2**n: the magic's own bits leave by the top
  return select(less(x, splat(-87.3f)), splat(0.0f), p * power);
}
// The same for any x; overflows to infinity.
TARS_INLINE Floats exp(Floats x) { return select(less(splat(88.0f), x), splat(__builtin_inff()), exp_of_negative(x)); }
TARS_INLINE Floats tanh(Floats x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

}  // namespace tars::TARS_ISA
