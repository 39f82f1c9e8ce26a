// The calls XLA makes: buffers in, buffers out, checks at the border.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "blocks.h"
#include "pack.h"

namespace tars {
namespace {

namespace ffi = xla::ffi;
using Int32s = ffi::Buffer<ffi::S32>;

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

constexpr size_t kFormatFields = 8;

// A weight's format, and which of some arrays holds its tiles from where on.
struct Place {
  Format format;
  int64_t offset, source;

  bool inside(const ffi::AnyBuffer& b) const {
    return offset >= 0 && offset + format.tiles() * format.tile_bytes() <= static_cast<int64_t>(b.size_bytes());
  }
  const uint8_t* in(const ffi::AnyBuffer& b) const { return static_cast<const uint8_t*>(b.untyped_data()) + offset; }
};

Place place_of(ffi::Span<const int64_t> fields, size_t i) {
  const int64_t* f = fields.begin() + i * kFormatFields;
  return {{f[0], f[1], f[2], static_cast<DType>(f[3]), f[4], f[5]}, f[6], f[7]};
}

// An array of `rank` dimensions for all rows; or with one more before them, its members for equal runs of the rows.
bool read_runs(const ffi::AnyBuffer& b, int64_t rank, int64_t rows, RunFloats* out) {
  *out = {};
  if (!b.element_count()) return true;
  const int64_t runs = static_cast<int64_t>(b.dimensions().size()) > rank ? b.dimensions()[0] : 1;
  if (rows % runs) return false;
  *out = {optional_floats(b), std::max<int64_t>(rows / runs, 1), static_cast<int64_t>(b.element_count()) / runs};
  return true;
}

// Arguments that are read one after the other; before them those that hold tiles.
class Arguments {
 public:
  Arguments(ffi::RemainingArgs args, int64_t sources) : args_(args), sources_(sources), at_(sources) {}
  bool has(size_t count) const { return at_ + count <= args_.size(); }
  bool done() const { return at_ == args_.size(); }
  void skip(size_t count) { at_ += count; }
  ffi::AnyBuffer next() { return *args_.get<ffi::AnyBuffer>(at_++); }
  bool has_source(int64_t i) const { return i >= 0 && i < sources_ && i < static_cast<int64_t>(args_.size()); }
  ffi::AnyBuffer source(int64_t i) const { return *args_.get<ffi::AnyBuffer>(i); }

 private:
  const ffi::RemainingArgs args_;
  const int64_t sources_;
  size_t at_;
};

// a [(N,) ranks, outputs], b [(N,) ranks, inputs], scale: one number, or [rows, ranks].
ffi::Error read_update(Arguments& args, const Format& format, int64_t rows, LowRank* out) {
  const ffi::AnyBuffer a = args.next(), b = args.next(), scale = args.next();
  out->ranks = b.dimensions()[b.dimensions().size() - 2];
  const bool fits = read_runs(a, 2, rows, &out->a) && read_runs(b, 2, rows, &out->b);
  const int64_t scales = static_cast<int64_t>(scale.element_count());
  if (!fits || out->ranks < 1 || out->a.size != out->ranks * format.outputs || out->b.size != out->ranks * format.inputs ||
      (scales != 1 && scales != rows * out->ranks))
    return invalid("a low-rank update has the wrong shape");
  out->scale = optional_floats(scale);
  out->scale_row = scales == 1 ? 0 : out->ranks;
  out->scale_rank = scales == 1 ? 0 : 1;
  return ffi::Error::Success();
}

// Bias of a weight, then its updates.
ffi::Error read_operand(Arguments& args, const Place& w, int64_t updates, int64_t rows, Operand* out) {
  if (!args.has(1 + 3 * updates) || !args.has_source(w.source)) return invalid("wrong number of arrays");
  const ffi::AnyBuffer data = args.source(w.source), bias = args.next();
  if (!w.inside(data)) return invalid("packed weight has the wrong size");
  *out = {w.format, w.in(data), {}, std::vector<LowRank>(updates)};
  if (!read_runs(bias, 1, rows, &out->finish.bias)) return invalid("a bias has the wrong shape");
  out->finish.outputs = w.format.outputs;
  for (LowRank& update : out->updates)
    if (ffi::Error error = read_update(args, w.format, rows, &update); error.failure()) return error;
  return ffi::Error::Success();
}

// Arguments: x, norm, residual, where prompts begin, the arrays that hold tiles, then those of each weight. Results: one per weight, or one if gated.
ffi::Error product(ffi::ThreadPool thread_pool, ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer residual, Int32s prompts_at, ffi::RemainingArgs arrays,
                   ffi::RemainingRets results, ffi::Span<const int64_t> formats, ffi::Span<const int64_t> updates,
                   ffi::Span<const int64_t> sources, float eps, int64_t activation, int64_t gated) {
  const size_t weights = updates.size();
  Arguments args(arrays, sources.begin()[0]);
  if (formats.size() != weights * kFormatFields || results.size() != (gated ? 1 : weights)) return invalid("wrong number of arrays");
  Product p;
  if (!dtype_of(x.element_type(), &p.x_type)) return invalid("activations must be float32, float16 or bfloat16");
  p.x = x.untyped_data();
  p.rows = x.dimensions()[0];
  p.inputs = x.dimensions()[1];
  if (!read_runs(norm, 1, p.rows, &p.norm)) return invalid("a norm has the wrong shape");
  p.eps = eps;
  p.gated = gated;
  if (prompts_at.element_count() != 1) return invalid("wrong number of arrays");
  p.prompts_at = std::clamp<int64_t>(prompts_at.typed_data()[0], 0, p.rows);
  for (size_t i = 0; i < weights; ++i) {
    Operand o;
    if (ffi::Error error = read_operand(args, place_of(formats, i), updates.begin()[i], p.rows, &o); error.failure()) return error;
    if (o.format.inputs != p.inputs) return invalid("weight and activations differ in inputs");
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
    p.operands.push_back(std::move(o));
  }
  if (!args.done()) return invalid("wrong number of arrays");
  XlaPool pool(thread_pool);
  run_product(pool, std::move(p));
  return ffi::Error::Success();
}

// The cache's part of an attention over heads of `head_dim`; false if the types do not fit.
bool describe_cache(const ffi::AnyBuffer& k_pages, const ffi::AnyBuffer& v_pages, int64_t head_dim, AttentionTask* t) {
  if (!cache_type_of(k_pages, head_dim, &t->cache_type) || v_pages.element_type() != k_pages.element_type()) return false;
  t->head_dim = head_dim;
  t->kv_heads = k_pages.dimensions()[1];
  t->page = k_pages.dimensions()[2];
  t->page_shift = t->page & (t->page - 1) ? -1 : __builtin_ctzll(t->page);
  return true;
}

void describe_batch(int64_t tokens, const Int32s& query_starts, const Int32s& kv_lengths, const Int32s& page_tables, Attention* a) {
  a->tokens = tokens;
  a->rows = kv_lengths.dimensions()[0];
  a->table_width = page_tables.dimensions()[1];
  a->query_starts = query_starts.typed_data();
  a->kv_lengths = kv_lengths.typed_data();
  a->page_tables = page_tables.typed_data();
}

ffi::Error attention(ffi::ThreadPool thread_pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, Int32s query_starts,
                     Int32s kv_lengths, Int32s page_tables, ffi::Result<ffi::AnyBuffer> out, float scale, float softcap, int64_t window) {
  Attention a{};
  AttentionTask& t = a.base;
  if (!dtype_of(q.element_type(), &t.q_type) || out->element_type() != q.element_type()) return invalid("unsupported dtype in attention");
  if (!describe_cache(k_pages, v_pages, q.dimensions()[2], &t)) return invalid("unsupported pages in attention");
  t.q = q.untyped_data();
  t.heads = q.dimensions()[1];
  t.window = window;
  t.scale = scale;
  t.softcap = softcap;
  t.out = out->untyped_data();
  describe_batch(q.dimensions()[0], query_starts, kv_lengths, page_tables, &a);
  XlaPool pool(thread_pool);
  run_attention(pool, a, {k_pages.untyped_data(), v_pages.untyped_data()});
  return ffi::Error::Success();
}

RotateTask heads_of(DType type, int64_t heads, int64_t head_dim, float eps) {
  RotateTask t{};
  t.type = type;
  t.heads = heads;
  t.head_dim = head_dim;
  t.eps = eps;
  return t;
}

// Of the three kinds of heads all but the arrays and norms; the table is that of all tokens.
void describe_write(DType type, int64_t tokens, int64_t heads, const AttentionTask& t, float eps, const ffi::AnyBuffer& cos,
                    const ffi::AnyBuffer& sin, const Int32s& slot_pages, const Int32s& slot_offsets, RopeWrite* w) {
  w->q = heads_of(type, heads, t.head_dim, eps);
  w->k = w->v = heads_of(type, t.kv_heads, t.head_dim, eps);
  w->tokens = tokens;
  w->page = t.page;
  w->cache_type = t.cache_type;
  if (cos.element_count() && tokens) {
    w->q.half = w->k.half = static_cast<int64_t>(cos.element_count()) / tokens;
    w->q.cos = w->k.cos = optional_floats(cos);
    w->q.sin = w->k.sin = optional_floats(sin);
  }
  w->slot_pages = slot_pages.typed_data();
  w->slot_offsets = slot_offsets.typed_data();
}

constexpr int64_t kMostHeadDim = 1024;  // what `rotate` has room for

// k_pages and v_pages are aliased to the results: XLA copies them beforehand only when someone else still needs them.
ffi::Error rope_write(ffi::ThreadPool thread_pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                      ffi::AnyBuffer q_norm, ffi::AnyBuffer k_norm, Int32s slot_pages, Int32s slot_offsets, ffi::AnyBuffer k_pages,
                      ffi::AnyBuffer v_pages, ffi::Result<ffi::AnyBuffer> q_out, ffi::Result<ffi::AnyBuffer> k_out,
                      ffi::Result<ffi::AnyBuffer> v_out, float eps) {
  DType type;
  AttentionTask t{};
  if (!dtype_of(q.element_type(), &type) || !describe_cache(k_pages, v_pages, q.dimensions()[2], &t))
    return invalid("unsupported dtype or pages in rope_write");
  if (k_out->untyped_data() != k_pages.untyped_data() || v_out->untyped_data() != v_pages.untyped_data()) return invalid("cache is not aliased");
  if (t.head_dim > kMostHeadDim) return invalid("head_dim above 1024");
  RopeWrite w{};
  describe_write(type, q.dimensions()[0], q.dimensions()[1], t, eps, cos, sin, slot_pages, slot_offsets, &w);
  w.q.in = q.untyped_data();
  w.k.in = k.untyped_data();
  w.v.in = v.untyped_data();
  w.q.norm = optional_floats(q_norm);
  w.k.norm = optional_floats(k_norm);
  w.q_out = q_out->untyped_data();
  XlaPool pool(thread_pool);
  run_rope_write(pool, w, {k_out->untyped_data(), v_out->untyped_data()});
  return ffi::Error::Success();
}

constexpr size_t kBlockNorms = 4, kBlockWeights = 7;

// The arrays of a block: norms of the attention, of queries, of keys and of the feed-forward; then those of q, k, v, o, gate, up, down.
ffi::Error read_block(Arguments& args, ffi::Span<const int64_t> formats, ffi::Span<const int64_t> updates, size_t first, const Blocks& b, Block* w) {
  if (!args.has(kBlockNorms)) return invalid("wrong number of arrays");
  const ffi::AnyBuffer attention_norm = args.next();
  w->q_norm = optional_floats(args.next());
  w->k_norm = optional_floats(args.next());
  if (!read_runs(attention_norm, 1, b.rows, &w->attention_norm) || !read_runs(args.next(), 1, b.rows, &w->mlp_norm))
    return invalid("a norm has the wrong shape");
  Operand* operands[kBlockWeights] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
  for (size_t i = 0; i < kBlockWeights; ++i) {
    const Place place = place_of(formats, first + i);
    if (operands[i] == &w->gate && !place.format.outputs) args.skip(1);
    else if (ffi::Error error = read_operand(args, place, updates.begin()[first + i], b.rows, operands[i]); error.failure()) return error;
  }
  const AttentionTask& a = b.attention.base;
  const int64_t q = a.heads * a.head_dim, kv = a.kv_heads * a.head_dim, D = b.width, F = w->up.format.outputs;
  const int64_t shapes[kBlockWeights][2] = {{q, D}, {kv, D}, {kv, D}, {D, q}, {F, D}, {F, D}, {D, F}};
  for (size_t i = 0; i < kBlockWeights; ++i) {
    const Operand& o = *operands[i];
    if (o.data && (o.format.outputs != shapes[i][0] || o.format.inputs != shapes[i][1])) return invalid("a block's weight has the wrong shape");
  }
  return ffi::Error::Success();
}

// What follows the last sequence becomes zeros.
void leave_out_padding(Blocks& b) {
  const Attention& a = b.attention;
  const int64_t used = a.rows ? std::clamp<int64_t>(a.query_starts[a.rows], 0, b.rows) : 0, size = b.width * size_of(b.type);
  std::memset(static_cast<char*>(b.out) + used * size, 0, (b.rows - used) * size);
  b.rows = b.attention.tokens = b.write.tokens = used;
}

// Arguments after the pages: the arrays that hold tiles, then `read_block`'s of each block. first_pages: where each block's pages begin in the cache.
ffi::Error blocks(ffi::ThreadPool thread_pool, ffi::AnyBuffer x, ffi::AnyBuffer cos, ffi::AnyBuffer sin, Int32s slot_pages, Int32s slot_offsets,
                  Int32s query_starts, Int32s kv_lengths, Int32s page_tables, Int32s prompts_at, ffi::AnyBuffer k_pages,
                  ffi::AnyBuffer v_pages, ffi::RemainingArgs arrays, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> k_out, ffi::Result<ffi::AnyBuffer> v_out,
                  ffi::Span<const int64_t> formats, ffi::Span<const int64_t> updates, ffi::Span<const int64_t> sources,
                  ffi::Span<const int64_t> first_pages, ffi::Span<const int64_t> rotates, int64_t heads,
                  int64_t head_dim, int64_t activation, int64_t window, float scale, float softcap, float eps) {
  const size_t count = first_pages.size();
  const size_t weights = count * kBlockWeights;
  if (formats.size() != weights * kFormatFields || updates.size() != weights || rotates.size() != count) return invalid("wrong number of arrays");
  Blocks b{};
  AttentionTask& t = b.attention.base;
  if (!dtype_of(x.element_type(), &b.type) || out->element_type() != x.element_type() || !describe_cache(k_pages, v_pages, head_dim, &t))
    return invalid("unsupported dtype or pages in blocks");
  if (k_out->untyped_data() != k_pages.untyped_data() || v_out->untyped_data() != v_pages.untyped_data()) return invalid("cache is not aliased");
  if (head_dim > kMostHeadDim) return invalid("head_dim above 1024");
  b.x = x.untyped_data();
  b.out = out->untyped_data();
  b.rows = x.dimensions()[0];
  b.width = x.dimensions()[1];
  b.eps = eps;
  b.activation = static_cast<Activation>(activation);
  t.q_type = b.type;
  t.heads = heads;
  t.window = window;
  t.scale = scale;
  t.softcap = softcap;
  describe_batch(b.rows, query_starts, kv_lengths, page_tables, &b.attention);
  describe_write(b.type, b.rows, heads, t, eps, cos, sin, slot_pages, slot_offsets, &b.write);
  const int64_t page_bytes = t.kv_heads * t.page * cache_bytes(t.cache_type, head_dim), last = k_pages.dimensions()[0];
  b.blocks.resize(count);
  Arguments args(arrays, sources.begin()[0]);
  for (size_t i = 0; i < count; ++i) {
    Block& w = b.blocks[i];
    if (ffi::Error error = read_block(args, formats, updates, i * kBlockWeights, b, &w); error.failure()) return error;
    const int64_t first = first_pages.begin()[i];
    if (first < 0 || first >= last) return invalid("a block's pages are outside the cache");
    w.pages = {static_cast<char*>(k_out->untyped_data()) + first * page_bytes, static_cast<char*>(v_out->untyped_data()) + first * page_bytes};
    w.rotates = rotates.begin()[i];
  }
  if (!args.done() || prompts_at.element_count() != 1) return invalid("wrong number of arrays");
  leave_out_padding(b);
  b.prompts_at = std::clamp<int64_t>(prompts_at.typed_data()[0], 0, b.rows);
  XlaPool pool(thread_pool);
  run_blocks(pool, b);
  return ffi::Error::Success();
}

// Leaves its result as the allocator gave it: of a large array the system then provides only the pages that are written.
ffi::Error empty(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

ffi::Error take_rows(ffi::AnyBuffer data, ffi::Buffer<ffi::S32> ids, ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Span<const int64_t> format) {
  const Place w = place_of(format, 0);
  const Format& f = w.format;
  if (!w.inside(data)) return invalid("packed weight has the wrong size");
  for (size_t i = 0; i < ids.element_count(); ++i) {
    int64_t id = ids.typed_data()[i];
    id = id < 0 ? 0 : id >= f.outputs ? f.outputs - 1 : id;  // as XLA's gather
    take_row(f, w.in(data), id, out->typed_data() + i * f.inputs);
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
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>().RemainingArgs().RemainingRets()
                                  .Attr<Int64s>("formats").Attr<Int64s>("updates").Attr<Int64s>("sources").Attr<float>("eps").Attr<int64_t>("activation")
                                  .Attr<int64_t>("gated"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_blocks, tars::blocks,
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>()
                                  .Arg<Buffer<S32>>().Arg<Buffer<S32>>().Arg<Buffer<S32>>().Arg<Buffer<S32>>().Arg<Buffer<S32>>()
                                  .Arg<AnyBuffer>().Arg<AnyBuffer>()
                                  .RemainingArgs().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Attr<Int64s>("formats")
                                  .Attr<Int64s>("updates").Attr<Int64s>("sources").Attr<Int64s>("first_pages").Attr<Int64s>("rotates")
                                  .Attr<int64_t>("heads").Attr<int64_t>("head_dim").Attr<int64_t>("activation").Attr<int64_t>("window")
                                  .Attr<float>("scale").Attr<float>("softcap").Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_attention, tars::attention,
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>()
                                  .Arg<Buffer<S32>>().Arg<Buffer<S32>>().Ret<AnyBuffer>().Attr<float>("scale").Attr<float>("softcap")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_rope_write, tars::rope_write,
                              Ffi::Bind().Ctx<ThreadPool>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<Buffer<S32>>().Arg<Buffer<S32>>()
                                  .Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_take_rows, tars::take_rows,
                              Ffi::Bind().Arg<AnyBuffer>().Arg<Buffer<S32>>().Ret<Buffer<xla::ffi::F32>>().Attr<Int64s>("format"));

extern "C" const char* tars_isa() { return tars::kernels().name; }
extern "C" int tars_native_pairs() { return tars::kernels().native_pairs(); }
extern "C" int tars_use_isa(const char* name) { return tars::use_kernels(name); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(tars_empty, tars::empty, Ffi::Bind().Ret<AnyBuffer>());
