// The calls XLA makes: buffers in, buffers out, checks at the border.
#include "xla/ffi/api/ffi.h"

#include <string>

#include "attention.h"
#include "pack.h"
#include "product.h"

namespace tars {
namespace {

namespace ffi = xla::ffi;

class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool), threads_(static_cast<int>(pool.num_threads())) {}
  int threads() const override { return threads_ < 1 ? 1 : threads_; }
  void schedule(std::shared_ptr<Job> job) override {
    pool_.Schedule([job = std::move(job)] { job->work(); });
  }

 private:
  ffi::ThreadPool& pool_;
  const int threads_;
};

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("tars: " + what); }

bool dtype_of(ffi::DataType type, DType* out) {
  switch (type) {
    case ffi::DataType::F32: *out = DType::kF32; return true;
    case ffi::DataType::F16: *out = DType::kF16; return true;
    case ffi::DataType::BF16: *out = DType::kBF16; return true;
    default: return false;
  }
}

// Of pages of vectors of `head_dim` numbers.
bool cache_type_of(const ffi::AnyBuffer& pages, int64_t head_dim, DType* out) {
  if (pages.element_type() == ffi::DataType::S8) *out = DType::kI8;
  else if (!dtype_of(pages.element_type(), out)) return false;
  return pages.dimensions()[3] * size_of(*out) == cache_bytes(*out, head_dim);
}

// Absent arrays are passed with no elements.
const float* optional_floats(const ffi::AnyBuffer& b) {
  return b.element_count() ? static_cast<const float*>(b.untyped_data()) : nullptr;
}

constexpr size_t kFormatFields = 6;

Format format_of(ffi::Span<const int64_t> fields, size_t i) {
  const int64_t* f = fields.begin() + i * kFormatFields;
  return {f[0], f[1], f[2], static_cast<DType>(f[3]), f[4], f[5]};
}

// Arguments: x, norm, residual, then (data, bias) of each weight. Results: one per weight, or one if gated.
ffi::Error product(ffi::ThreadPool thread_pool, ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Span<const int64_t> formats,
                   float eps, int64_t activation, int64_t gated) {
  const size_t weights = formats.size() / kFormatFields;
  if (args.size() != 3 + 2 * weights || results.size() != (gated ? 1 : weights)) return invalid("wrong number of arrays");
  ffi::AnyBuffer x = *args.get<ffi::AnyBuffer>(0), norm = *args.get<ffi::AnyBuffer>(1), residual = *args.get<ffi::AnyBuffer>(2);
  Product p;
  if (!dtype_of(x.element_type(), &p.x_type)) return invalid("activations must be float32, float16 or bfloat16");
  p.x = x.untyped_data();
  p.rows = x.dimensions()[0];
  p.inputs = x.dimensions()[1];
  p.norm = optional_floats(norm);
  p.eps = eps;
  p.gated = gated;
  for (size_t i = 0; i < weights; ++i) {
    ffi::AnyBuffer data = *args.get<ffi::AnyBuffer>(3 + 2 * i), bias = *args.get<ffi::AnyBuffer>(4 + 2 * i);
    Operand o{format_of(formats, i), static_cast<const uint8_t*>(data.untyped_data()), {}};
    if (o.format.inputs != p.inputs) return invalid("weight and activations differ in inputs");
    if (static_cast<int64_t>(data.size_bytes()) != o.format.tiles() * o.format.tile_bytes()) return invalid("packed weight has the wrong size");
    o.finish.bias = optional_floats(bias);
    o.finish.outputs = o.format.outputs;
    if (!gated || i == 0) {
      ffi::Result<ffi::AnyBuffer> out = *results.get<ffi::AnyBuffer>(i);
      if (!dtype_of(out->element_type(), &o.finish.out_type)) return invalid("results must be float32, float16 or bfloat16");
      o.finish.activation = static_cast<Activation>(activation);
      o.finish.out = out->untyped_data();
      if (residual.element_count()) {
        o.finish.residual = residual.untyped_data();
        if (!dtype_of(residual.element_type(), &o.finish.residual_type)) return invalid("residual must be float32, float16 or bfloat16");
      }
    } else {
      p.operands[0].finish.other_bias = o.finish.bias;
    }
    p.operands.push_back(o);
  }
  XlaPool pool(thread_pool);
  run_products(pool, {p});
  return ffi::Error::Success();
}

// Arguments: heads, residual, norm, then (data, bias) of the output projection, the gate (absent if there are three weights), up and down.
ffi::Error output_mlp(ffi::ThreadPool thread_pool, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out, ffi::Span<const int64_t> formats,
                      float eps, int64_t activation) {
  const size_t weights = formats.size() / kFormatFields;
  if (weights < 3 || weights > 4 || args.size() != 3 + 2 * weights) return invalid("wrong number of arrays");
  ffi::AnyBuffer heads = *args.get<ffi::AnyBuffer>(0), residual = *args.get<ffi::AnyBuffer>(1), norm = *args.get<ffi::AnyBuffer>(2);
  DType type, residual_type;
  if (!dtype_of(heads.element_type(), &type) || !dtype_of(residual.element_type(), &residual_type)) return invalid("unsupported dtype in output_mlp");
  if (out->element_type() != residual.element_type()) return invalid("dtypes differ in output_mlp");
  std::vector<Operand> w;
  for (size_t i = 0; i < weights; ++i) {
    ffi::AnyBuffer data = *args.get<ffi::AnyBuffer>(3 + 2 * i), bias = *args.get<ffi::AnyBuffer>(4 + 2 * i);
    w.push_back({format_of(formats, i), static_cast<const uint8_t*>(data.untyped_data()), {}});
    const Format& f = w.back().format;
    if (static_cast<int64_t>(data.size_bytes()) != f.tiles() * f.tile_bytes()) return invalid("packed weight has the wrong size");
    w.back().finish.bias = optional_floats(bias);
    w.back().finish.outputs = f.outputs;
  }
  const int64_t rows = heads.dimensions()[0], width = residual.dimensions()[1], inner = w[weights - 2].format.outputs;
  if (w[0].format.inputs != heads.dimensions()[1] || w[0].format.outputs != width || w[1].format.inputs != width ||
      w[weights - 2].format.inputs != width || w[1].format.outputs != inner || w[weights - 1].format.inputs != inner ||
      w[weights - 1].format.outputs != width)
    return invalid("weight and activations differ in inputs");
  static thread_local Scratch scratch;
  const int64_t middle_bytes = ceil_div(rows * width * size_of(residual_type), 64) * 64;
  char* middle = static_cast<char*>(scratch.get(middle_bytes + rows * inner * size_of(type)));
  char* hidden = middle + middle_bytes;
  Product project{heads.untyped_data(), type, rows, w[0].format.inputs, nullptr, 0.0f, {w[0]}, false};
  Product widen{middle, residual_type, rows, width, optional_floats(norm), eps, {w[1]}, weights == 4};
  Product narrow{hidden, type, rows, inner, nullptr, 0.0f, {w[weights - 1]}, false};
  Finish& a = project.operands[0].finish;
  a.residual = residual.untyped_data(), a.residual_type = residual_type, a.out = middle, a.out_type = residual_type;
  if (weights == 4) widen.operands.push_back(w[2]);
  Finish& b = widen.operands[0].finish;
  b.activation = static_cast<Activation>(activation), b.out = hidden, b.out_type = type;
  if (weights == 4) b.other_bias = w[2].finish.bias;
  Finish& c = narrow.operands[0].finish;
  c.residual = middle, c.residual_type = residual_type, c.out = out->untyped_data(), c.out_type = residual_type;
  XlaPool pool(thread_pool);
  run_products(pool, {project, widen, narrow});
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool thread_pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages,
                     ffi::Buffer<ffi::S32> query_starts, ffi::Buffer<ffi::S32> kv_lengths, ffi::Buffer<ffi::S32> page_tables,
                     ffi::Result<ffi::AnyBuffer> out, float scale, float softcap, int64_t window) {
  Attention a{};
  AttentionTask& t = a.base;
  if (!dtype_of(q.element_type(), &t.q_type) || !cache_type_of(k_pages, q.dimensions()[2], &t.cache_type)) return invalid("unsupported dtype or pages in attention");
  if (v_pages.element_type() != k_pages.element_type() || out->element_type() != q.element_type()) return invalid("dtypes differ in attention");
  t.q = q.untyped_data();
  t.k_pages = k_pages.untyped_data();
  t.v_pages = v_pages.untyped_data();
  t.heads = q.dimensions()[1];
  t.head_dim = q.dimensions()[2];
  t.kv_heads = k_pages.dimensions()[1];
  t.page = k_pages.dimensions()[2];
  t.page_shift = t.page & (t.page - 1) ? -1 : __builtin_ctzll(t.page);
  t.window = window;
  t.scale = scale;
  t.softcap = softcap;
  t.out = out->untyped_data();
  a.tokens = q.dimensions()[0];
  a.rows = kv_lengths.dimensions()[0];
  a.table_width = page_tables.dimensions()[1];
  a.query_starts = query_starts.typed_data();
  a.kv_lengths = kv_lengths.typed_data();
  a.page_tables = page_tables.typed_data();
  XlaPool pool(thread_pool);
  run_attention(pool, a);
  return ffi::Error::Success();
}

RotateTask heads_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& norm, float eps) {
  RotateTask t{};
  dtype_of(x.element_type(), &t.type);
  t.in = x.untyped_data();
  t.heads = x.dimensions()[1];
  t.head_dim = x.dimensions()[2];
  t.norm = optional_floats(norm);
  t.eps = eps;
  return t;
}

// k_pages and v_pages are aliased to the results: XLA copies them beforehand only when someone else still needs them.
ffi::Error rope_write(ffi::ThreadPool thread_pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                      ffi::AnyBuffer q_norm, ffi::AnyBuffer k_norm, ffi::Buffer<ffi::S32> slot_pages, ffi::Buffer<ffi::S32> slot_offsets,
                      ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::Result<ffi::AnyBuffer> q_out, ffi::Result<ffi::AnyBuffer> k_out,
                      ffi::Result<ffi::AnyBuffer> v_out, float eps) {
  RopeWrite w{};
  if (!dtype_of(q.element_type(), &w.q_type) || !cache_type_of(k_pages, q.dimensions()[2], &w.cache_type)) return invalid("unsupported dtype or pages in rope_write");
  if (k_out->untyped_data() != k_pages.untyped_data() || v_out->untyped_data() != v_pages.untyped_data()) return invalid("cache is not aliased");
  if (q.dimensions()[2] > 1024) return invalid("head_dim above 1024");
  w.q = heads_of(q, q_norm, eps);
  w.k = heads_of(k, k_norm, eps);
  w.v = heads_of(v, k_norm, eps);
  w.v.norm = nullptr;
  w.tokens = q.dimensions()[0];
  if (cos.element_count() && w.tokens) {
    w.q.half = w.k.half = static_cast<int64_t>(cos.element_count()) / w.tokens;
    w.q.cos = w.k.cos = optional_floats(cos);
    w.q.sin = w.k.sin = optional_floats(sin);
  }
  w.page = k_pages.dimensions()[2];
  w.q_out = q_out->untyped_data();
  w.k_pages = k_out->untyped_data();
  w.v_pages = v_out->untyped_data();
  w.slot_pages = slot_pages.typed_data();
  w.slot_offsets = slot_offsets.typed_data();
  XlaPool pool(thread_pool);
  run_rope_write(pool, w);
  return ffi::Error::Success();
}

// Leaves its result as the allocator gave it: of a large array the system then provides only the pages that are written.
ffi::Error empty(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

ffi::Error take_rows(ffi::AnyBuffer data, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Span<const int64_t> formats) {
  const Format f = format_of(formats, 0);
  if (static_cast<int64_t>(data.size_bytes()) != f.tiles() * f.tile_bytes()) return invalid("packed weight has the wrong size");
  for (size_t i = 0; i < ids.element_count(); ++i) {
    int64_t id = ids.typed_data()[i];
    id = id < 0 ? 0 : id >= f.outputs ? f.outputs - 1 : id;  // as XLA's gather
    take_row(f, static_cast<const uint8_t*>(data.untyped_data()), id, out->typed_data() + i * f.inputs);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tars

using xla::ffi::AnyBuffer;
using xla::ffi::Buffer;
using xla::ffi::Ffi;
using xla::ffi::S32;
using xla::ffi::ThreadPool;
using Int64s = xla::ffi::Span<const int64_t>;

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_product, tars::product,
                              Ffi::Bind().Ctx<ThreadPool>().RemainingArgs().RemainingRets().Attr<Int64s>("formats").Attr<float>("eps")
                                  .Attr<int64_t>("activation").Attr<int64_t>("gated"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_output_mlp, tars::output_mlp,
                              Ffi::Bind().Ctx<ThreadPool>().RemainingArgs().Ret<AnyBuffer>().Attr<Int64s>("formats").Attr<float>("eps")
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_attention, tars::attention,
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>()
                                  .Arg<Buffer<S32>>().Arg<Buffer<S32>>().Ret<AnyBuffer>().Attr<float>("scale").Attr<float>("softcap")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_rope_write, tars::rope_write,
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>().Arg<Buffer<S32>>()
                                  .Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_take_rows, tars::take_rows,
                              Ffi::Bind().Arg<AnyBuffer>().Arg<Buffer<S32>>().Ret<Buffer<xla::ffi::F32>>().Attr<Int64s>("formats"));

extern "C" const char* tars_isa() { return tars::kernels().name; }
extern "C" int tars_use_isa(const char* name) { return tars::use_kernels(name); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_empty, tars::empty, Ffi::Bind().Ret<AnyBuffer>());
