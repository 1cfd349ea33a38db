// The only file that knows Python: checks shapes and dtypes, releases the GIL, calls the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"
#include "pool.h"
#include "stack.h"
#include "table.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

constexpr Table BASE = {"base", base::gemm, base::norm, base::mla, base::index, base::stream};
#ifdef GLM52_X86
constexpr Table AVX2 = {"avx2", avx2::gemm, avx2::norm, avx2::mla, avx2::index, avx2::stream};
constexpr Table AVX512 = {"avx512", avx512::gemm, avx512::norm, avx512::mla, avx512::index, avx512::stream};
constexpr Table AMX = {"amx", amx::gemm, amx::norm, amx::mla, amx::index, amx::stream};

// The kernel hands out the tiles' registers only to processes that ask for them.
bool has_tiles() {
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Table*> supported() {
  std::vector<const Table*> tables = {&BASE};
#ifdef GLM52_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&AVX2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) {
      tables.push_back(&AVX512);
      if (has_tiles()) tables.push_back(&AMX);
    }
  }
#endif
  return tables;
}

const Table& choose() {
  const auto tables = supported();
  const char* wanted = std::getenv("GLM52_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string names;
  for (const Table* t : tables) {
    if (std::string(wanted) == t->name) return *t;
    names += std::string(names.empty() ? "" : ", ") + t->name;
  }
  throw std::runtime_error("GLM52_ISA: this CPU has " + names + ", found " + wanted);
}

const Table* table = nullptr;

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

template <class A>
std::string shape_of(const A& a) {
  std::string out = "[";
  for (size_t i = 0; i < a.ndim(); ++i) out += (i ? ", " : "") + std::to_string(a.shape(i));
  return out + "]";
}

bool is_f32(nb::dlpack::dtype t) { return t == nb::dtype<float>(); }
bool is_bf16(nb::dlpack::dtype t) {
  return t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && t.bits == 16 && t.lanes == 1;
}

constexpr size_t ANY = static_cast<size_t>(-1);

// Contiguous, of that dtype and shape (ANY matches every size), or ValueError says what was found.
template <class A>
void require(const char* name, const A& a, bool dtype_ok, const char* dtype, std::initializer_list<size_t> shape) {
  if (!dtype_ok) refuse(std::string(name) + ": expected dtype " + dtype);
  bool fits = a.ndim() == shape.size();
  std::string wanted;
  size_t i = 0;
  for (size_t n : shape) {
    fits = fits && (n == ANY || a.shape(i) == n);
    wanted += (i++ ? ", " : "") + (n == ANY ? std::string("any") : std::to_string(n));
  }
  if (!fits) refuse(std::string(name) + ": expected shape [" + wanted + "], found " + shape_of(a));
  int64_t stride = 1;
  for (size_t d = a.size() ? a.ndim() : 0; d-- > 0;) {  // strides of nothing may be any
    if (a.shape(d) != 1 && a.stride(d) != stride)
      refuse(std::string(name) + ": expected contiguous rows; call .contiguous()");
    stride *= static_cast<int64_t>(a.shape(d));
  }
}

template <class A>
const float* floats(const char* name, const A& a, std::initializer_list<size_t> shape) {
  require(name, a, is_f32(a.dtype()), "float32", shape);
  return static_cast<const float*>(a.data());
}
float* floats_out(const char* name, Output& a, std::initializer_list<size_t> shape) {
  require(name, a, is_f32(a.dtype()), "float32", shape);
  return static_cast<float*>(a.data());
}
template <class T>
const T* integers(const char* name, const Array& a, std::initializer_list<size_t> shape) {
  require(name, a, a.dtype() == nb::dtype<T>(), sizeof(T) == 4 ? "int32" : "int64", shape);
  return static_cast<const T*>(a.data());
}

size_t within(const char* name, size_t n, size_t least, size_t most) {
  if (n < least || n > most) {
    refuse(std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(most) + ", found " +
           std::to_string(n));
  }
  return n;
}
constexpr size_t LARGE = 0x7fffffff;  // rows and their numbers are int32
size_t some_threads(size_t n) { return within("threads", n, 1, 1024); }

template <class T>
T cast(const char* name, const nb::handle& value) {
  try {
    return nb::cast<T>(value);
  } catch (const std::bad_cast&) {
    refuse(std::string(name) + ": found a value of another type");
  }
}
template <class T>
T entry(const nb::dict& d, const char* key) {
  if (!d.contains(key)) refuse(std::string(key) + ": expected an entry, found none");
  return cast<T>(key, d[key]);
}

Vector vector_of(const char* name, const Array& a, size_t size) {
  const float* p = floats(name, a, {size});
  return Vector(p, p + size);
}

// ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const char* name_of(Format f) {
  const char* names[] = {"f32", "bf16", "int8", "int4", "fp8"};
  return names[static_cast<int>(f)];
}

// ValueError unless it is the name of one of ``some``.
Format format_named(const std::string& name, std::initializer_list<Format> some) {
  std::string all;
  for (Format f : some) {
    if (name == name_of(f)) return f;
    all += std::string(all.empty() ? "" : ", ") + name_of(f);
  }
  refuse("format: expected one of " + all + ", found " + name);
}

// Zeros of int4, int8 of the scales' shape and each -8 to 8.
const int8_t* read_zeros(const Source& s, const Array& zeros, std::initializer_list<size_t> shape) {
  if (s.format != Format::int4) refuse(std::string("zeros: not expected for ") + name_of(s.format));
  require("zeros", zeros, zeros.dtype() == nb::dtype<int8_t>(), "int8", shape);
  const auto* z = static_cast<const int8_t*>(zeros.data());
  if (std::any_of(z, z + zeros.size(), [](int8_t x) { return x < -ZERO_POINT || x > ZERO_POINT; }))
    refuse("zeros: expected -8 to 8");
  return z;
}

void require_nibbles(const Array& w) {
  const auto* codes = static_cast<const int8_t*>(w.data());
  int8_t low = 0, high = 0;
  for (size_t i = 0; i < w.size(); ++i) low = std::min(low, codes[i]), high = std::max(high, codes[i]);
  if (low < -ZERO_POINT || high >= ZERO_POINT) refuse("w: expected -8 to 7 for int4");
}

Weights pack_matrix(const std::string& format, Array w, std::optional<Array> scales, size_t group, size_t scale_rows,
                    std::optional<Array> zeros, size_t threads) {
  Source s = {};
  s.format = format_named(format, {Format::f32, Format::bf16, Format::int8, Format::int4, Format::fp8});
  const bool dtype_ok = s.format == Format::f32    ? is_f32(w.dtype())
                        : s.format == Format::bf16 ? is_bf16(w.dtype())
                        : s.format == Format::fp8  ? w.dtype() == nb::dtype<uint8_t>()
                                                   : w.dtype() == nb::dtype<int8_t>();
  require("w", w, dtype_ok,
          s.format == Format::f32    ? "float32"
          : s.format == Format::bf16 ? "bfloat16"
          : s.format == Format::fp8  ? "uint8 (E4M3 bits)"
                                     : "int8",
          {ANY, ANY});
  if (s.format == Format::int4) require_nibbles(w);
  s.data = w.data();
  s.rows = w.shape(0);
  s.depth = w.shape(1);
  s.threads = some_threads(threads);
  if (!s.rows || !s.depth) refuse("w: expected at least one row and column, found " + shape_of(w));
  if (is_scaled(s.format) != scales.has_value()) {
    refuse(std::string("scales: ") + (scales ? "not expected for " : "expected for ") + format);
  }
  if (scales) {
    s.group = within("group", group, STEP, LARGE);
    const size_t of = is_integer(s.format) && group < s.depth ? INTEGER_GROUP : STEP;
    if (group % of) refuse("group: expected a multiple of " + std::to_string(of) + ", found " + std::to_string(group));
    s.scale_rows = within("scale_rows", scale_rows, 1, LARGE);
    const auto shape = {(s.rows + scale_rows - 1) / scale_rows, (s.depth + group - 1) / group};
    s.scales = floats("scales", *scales, shape);
    if (zeros) s.zeros = read_zeros(s, *zeros, shape);
  }
  const nb::gil_scoped_release unlocked;
  return pack(s);
}

void require_matrix(const char* name, const Weights& w, size_t rows, size_t depth) {
  if (!w) refuse(std::string(name) + ": expected a matrix, found None");
  if ((rows != ANY && w->rows != rows) || w->depth != depth) {
    refuse(std::string(name) + ": expected " + (rows == ANY ? "any" : std::to_string(rows)) + " x " +
           std::to_string(depth) + ", found " + std::to_string(w->rows) + " x " + std::to_string(w->depth));
  }
}

void linear(Array x, const Weights& w, Output y, size_t threads) {
  const float* in = floats("x", x, {ANY, ANY});
  const size_t T = x.shape(0);
  require_matrix("w", w, ANY, x.shape(1));
  float* out = floats_out("y", y, {T, w->rows});
  some_threads(threads);
  const nb::gil_scoped_release unlocked;
  Stack(Dims{}, *table, threads).linear(*w, in, w->depth, T, out, w->rows);
}

// Seconds to read a float array once, by all threads.
double read_seconds(Array data, size_t threads) {
  const float* p = floats("data", data, {ANY});
  const size_t n = data.shape(0);
  some_threads(threads);
  std::atomic<float> seen = 0.0f;
  const nb::gil_scoped_release unlocked;
  const auto began = std::chrono::steady_clock::now();
  pool::each(n, 1 << 16, threads, [&](size_t begin, size_t end) { seen.store(table->stream.read(p, begin, end)); });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

// ── the stack ────────────────────────────────────────────────────────────────────────────────────────────────────────

Dims read_dims(const nb::dict& d) {
  const auto n = [&](const char* key) { return within(key, entry<size_t>(d, key), 1, LARGE); };
  const auto f = [&](const char* key) { return entry<double>(d, key); };
  Dims out = {};
  out.hidden = n("hidden"), out.heads = n("heads"), out.query_rank = n("query_rank"), out.latent = n("latent");
  out.nope = n("nope"), out.rotary = n("rotary"), out.value = n("value"), out.index_heads = n("index_heads");
  out.index_dim = n("index_dim"), out.top_k = n("top_k"), out.experts = n("experts");
  out.experts_per_token = n("experts_per_token");
  out.eps = static_cast<float>(f("eps")), out.latent_eps = static_cast<float>(f("latent_eps"));
  out.index_eps = static_cast<float>(f("index_eps")), out.route_scale = static_cast<float>(f("route_scale"));
  out.normalize_weights = entry<bool>(d, "normalize_weights");
  out.theta = f("theta");
  if (out.index_dim % STEP) refuse("index_dim: expected a multiple of 4, found " + std::to_string(out.index_dim));
  return out;
}

Expert read_expert(const nb::handle& pair, size_t hidden) {
  const auto [gate_up, down] = cast<std::pair<Weights, Weights>>("experts", pair);
  require_matrix("gate_up", gate_up, ANY, hidden);
  require_matrix("down", down, hidden, down ? down->depth : 0);
  if (gate_up->panels() % 2 || down->depth > gate_up->rows / 2)
    refuse("gate_up: expected alternating panels of gate and up");
  return {gate_up, down};
}

void expert_ffn(Array x, Array ids, Array weights, const nb::list& experts, Output y, size_t threads) {
  const float* h = floats("x", x, {ANY, ANY});
  const size_t T = x.shape(0), D = x.shape(1);
  const int32_t* chosen = integers<int32_t>("ids", ids, {T, ANY});
  const size_t K = ids.shape(1);
  const float* w = floats("weights", weights, {T, K});
  float* out = floats_out("y", y, {T, D});
  std::vector<Expert> all;
  for (const nb::handle pair : experts) all.push_back(read_expert(pair, D));
  if (all.empty()) refuse("experts: expected at least one, found none");
  some_threads(threads);
  for (size_t i = 0; i < T * K; ++i) {
    if (chosen[i] < 0 || static_cast<size_t>(chosen[i]) >= all.size())
      refuse("ids: expected 0 to " + std::to_string(all.size() - 1));
  }
  if (!T || !K) return;
  const nb::gil_scoped_release unlocked;
  Stack(Dims{}, *table, threads).experts(all, Expert{}, T, K, chosen, w, h, out);
}

// Matrices one below the other, together of that many rows.
std::vector<Weights> read_below(const char* name, const nb::dict& l, size_t rows, size_t depth) {
  const auto all = entry<std::vector<Weights>>(l, name);
  for (const Weights& w : all) {
    require_matrix(name, w, ANY, depth);
    if ((w->format == Format::f32) != (all[0]->format == Format::f32))
      refuse(std::string(name) + ": f32 and other formats cannot be mixed");
    rows -= w->rows;
  }
  if (all.empty() || rows) refuse(std::string(name) + ": its matrices do not have the rows expected");
  return all;
}

void add_layer(Stack& s, const nb::dict& l) {
  const Dims& d = s.dims();
  const auto vec = [&](const char* key, size_t n) { return vector_of(key, entry<Array>(l, key), n); };
  if (s.ends.embedding) refuse("layer: expected before the ends are set");
  const bool full = l.contains("index_weights");
  Layer out;
  out.input_norm = vec("input_norm", d.hidden), out.post_norm = vec("post_norm", d.hidden);
  out.q_norm = vec("q_norm", d.query_rank), out.kv_norm = vec("kv_norm", d.latent);
  const auto matrix = [&](const char* key, size_t rows, size_t depth) {
    const auto w = entry<Weights>(l, key);
    require_matrix(key, w, rows, depth);
    return w;
  };
  out.a = read_below("a", l, d.query_rank + d.latent + d.rotary + (full ? d.index_dim : 0), d.hidden);
  out.q = read_below("q", l, d.heads * (d.nope + d.rotary) + (full ? d.index_heads * d.index_dim : 0), d.query_rank);
  out.o = matrix("o", d.hidden, d.heads * d.value);
  out.key = entry<std::vector<Weights>>(l, "key"), out.value = entry<std::vector<Weights>>(l, "value");
  if (out.key.size() != d.heads || out.value.size() != d.heads) refuse("key, value: expected a matrix for each head");
  for (size_t h = 0; h < d.heads; ++h) {
    require_matrix("key", out.key[h], d.latent, d.nope);
    require_matrix("value", out.value[h], d.value, d.latent);
  }
  if (full) {
    out.index_weights = matrix("index_weights", d.index_heads, d.hidden);
    if (out.index_weights->format != Format::f32) refuse("index_weights: expected f32");
    out.index_norm = vec("index_norm", d.index_dim), out.index_bias = vec("index_bias", d.index_dim);
  }
  if (l.contains("dense")) out.dense = read_expert(l["dense"], d.hidden);
  if (l.contains("router")) {
    out.router = matrix("router", d.experts, d.hidden);
    if (out.router->format != Format::f32) refuse("router: expected f32");
    out.router_bias = vec("router_bias", d.experts);
    within("experts_per_token", d.experts_per_token, 1, d.experts);
    for (const nb::handle pair : entry<nb::list>(l, "experts")) out.experts.push_back(read_expert(pair, d.hidden));
    if (out.experts.size() != d.experts) refuse("experts: expected " + std::to_string(d.experts));
  } else if (!out.dense.gate_up) {
    refuse("layer: expected a dense MLP or a router with experts");
  }
  s.layers.push_back(std::move(out));
  s.expert_use.emplace_back();
}

// ``written``: every token's position must lie on its sequence's pages.
Batch read_batch(const Array& where, const Array& tables, size_t page_size, const Cache& cache, size_t tokens,
                 bool written) {
  const int64_t* w = integers<int64_t>("where", where, {3, tokens});
  const int32_t* t = integers<int32_t>("tables", tables, {ANY, ANY});
  if (!page_size || page_size % PANEL)
    refuse("page_size: expected a multiple of 16, found " + std::to_string(page_size));
  const size_t S = tables.shape(0), width = tables.shape(1);
  if (page_size > cache.num_rows) refuse("page_size: expected no more than the cache's rows");
  for (size_t i = 0; i < tokens; ++i) {
    const int64_t position = w[i], row = w[tokens + i], seq = w[2 * tokens + i];
    if (position < 0 || seq < 0 || static_cast<size_t>(seq) >= S || row < 0 ||
        static_cast<size_t>(row) >= cache.num_rows) {
      refuse("where: token " + std::to_string(i) + " lies outside the cache or the tables");
    }
    if (written && static_cast<size_t>(position) >= width * page_size) {
      refuse("tables: token " + std::to_string(i) + " is beyond its sequence's pages");
    }
  }
  for (size_t i = 0; i < S * width; ++i) {
    if (t[i] < 0 || (static_cast<size_t>(t[i]) + 1) * page_size > cache.num_rows)
      refuse("tables: a page lies outside the cache");
  }
  return {tokens, w, w + tokens, w + 2 * tokens, t, width, page_size};
}

const int64_t* read_tokens(const Stack& s, const Array& tokens) {
  const int64_t* t = integers<int64_t>("tokens", tokens, {ANY});
  for (size_t i = 0; i < tokens.shape(0); ++i) {
    if (t[i] < 0 || static_cast<size_t>(t[i]) >= s.ends.vocabulary)
      refuse("tokens: token " + std::to_string(i) + " is outside the vocabulary");
  }
  if (!tokens.shape(0)) refuse("tokens: expected at least one, found none");
  return t;
}

void set_ends(Stack& s, Array embedding, Array norm, const nb::dict& draft) {
  const size_t D = s.dims().hidden;
  Ends e;
  e.as_float = is_f32(embedding.dtype());
  require("embedding", embedding, e.as_float || is_bf16(embedding.dtype()), "float32 or bfloat16", {ANY, D});
  e.embedding = embedding.data();
  e.vocabulary = embedding.shape(0);
  e.norm = vector_of("norm", norm, D);
  if (draft.size()) {
    const auto vec = [&](const char* key) { return vector_of(key, entry<Array>(draft, key), D); };
    e.embedding_norm = vec("enorm"), e.hidden_norm = vec("hnorm"), e.draft_norm = vec("shared_head.norm");
    e.combine = entry<Weights>(draft, "eh_proj");
    require_matrix("eh_proj", e.combine, D, 2 * D);
  }
  if (s.layers.empty() || !s.layers[0].index_weights || (e.combine && !s.layers.back().index_weights)) {
    refuse("layers: expected the first layer and the drafting one to own an indexer");
  }
  s.ends = std::move(e);
#ifdef __GLIBC__
  malloc_trim(0);  // all is packed: what that took need not stay with the allocator
#endif
}

// Without the interpreter, and one caller at a time: a stack has one scratch.
struct Alone {
  nb::gil_scoped_release unlocked;
  std::lock_guard<std::mutex> locked;
  explicit Alone(Stack& s) : locked(s.busy) {}
};

void forward(Stack& s, Array tokens, Array where, Array tables, size_t page_size, Cache& cache, Output h) {
  const int64_t* ids = read_tokens(s, tokens);
  const Batch b = read_batch(where, tables, page_size, cache, tokens.shape(0), true);
  float* out = floats_out("h", h, {b.tokens, s.dims().hidden});
  if (!cache.fits(s.dims(), s.layers)) refuse("cache: expected one of this model");
  const Alone alone(s);
  s.forward(ids, b, cache, out);
}

// What ``extend`` and ``propose`` take of a step.
struct Step {
  Batch batch;
  const int64_t *tokens, *last;
  const float* h;
};

Step read_step(const char* name, const Stack& s, const Array& h, const Array& tokens, const Array& where,
               const Array& tables, size_t page_size, const Cache& cache, const Array& last) {
  if (!s.ends.combine) refuse(std::string(name) + ": this model has no layer that drafts");
  const int64_t* ids = read_tokens(s, tokens);
  const Batch b = read_batch(where, tables, page_size, cache, tokens.shape(0), true);
  const int64_t* at = integers<int64_t>("last", last, {ANY});
  for (size_t i = 0; i < last.shape(0); ++i) {
    if (at[i] < 0 || static_cast<size_t>(at[i]) >= b.tokens || (i && at[i] <= at[i - 1]))
      refuse("last: expected places of tokens, ascending");
  }
  if (!cache.fits(s.dims(), s.layers)) refuse("cache: expected one of this model");
  return {b, ids, at, floats("h", h, {b.tokens, s.dims().hidden})};
}

void extend(Stack& s, Array h, Array tokens, Array where, Array tables, size_t page_size, Cache& cache, Array last,
            Selection& selection, Output z) {
  const Step step = read_step("extend", s, h, tokens, where, tables, page_size, cache, last);
  float* out = floats_out("z", z, {last.shape(0), s.dims().hidden});
  const Alone alone(s);
  s.extend(step.h, step.tokens, step.batch, cache, step.last, last.shape(0), selection, out);
}

void draft(Stack& s, Array z, Array tokens, Array positions, Cache& cache, Selection& selection, Output out) {
  if (!s.ends.combine) refuse("draft: this model has no layer that drafts");
  const int64_t* ids = read_tokens(s, tokens);
  const size_t S = tokens.shape(0);
  const int64_t* at = integers<int64_t>("positions", positions, {S});
  for (size_t i = 0; i < S; ++i) {
    if (at[i] < 0) refuse("positions: expected 0 or more");
  }
  const float* in = floats("z", z, {S, s.dims().hidden});
  float* to = floats_out("out", out, {S, s.dims().hidden});
  if (!cache.fits(s.dims(), s.layers)) refuse("cache: expected one of this model");
  if (selection.tokens != S || selection.num_rows > cache.num_rows)
    refuse("selection: expected one for each token, of this cache");
  const Alone alone(s);
  s.draft(in, ids, at, S, cache, selection, to);
}

void propose(Stack& s, const Weights& head, Array h, Array tokens, Array where, Array tables, size_t page_size,
             Cache& cache, Array last, Output out) {
  const Step step = read_step("propose", s, h, tokens, where, tables, page_size, cache, last);
  require_matrix("head", head, s.ends.vocabulary, s.dims().hidden);
  require("out", out, out.dtype() == nb::dtype<int64_t>(), "int64", {last.shape(0), ANY});
  if (!last.shape(0)) refuse("last: expected at least one, found none");
  const Alone alone(s);
  s.propose(*head, step.h, step.tokens, step.batch, cache, step.last, last.shape(0), out.shape(1),
            static_cast<int64_t*>(out.data()));
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // what threads still hold when the interpreter ends is no leak
  table = &choose();
  m.def("isa", [] { return std::string(table->name); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Table* t : supported()) names.emplace_back(t->name);
        return names;
      },
      "Every instruction set of this build that this CPU has, the widest last.");

  nb::class_<Matrix>(m, "Matrix", "A weight matrix in panels of 16 rows.")
      .def_prop_ro("rows", [](const Matrix& w) { return w.rows; })
      .def_prop_ro("depth", [](const Matrix& w) { return w.depth; })
      .def_prop_ro("format", [](const Matrix& w) { return name_of(w.format); })
      .def_prop_ro("num_bytes", &Matrix::bytes);
  m.def("pack", &pack_matrix, nb::arg("format"), nb::arg("w"), nb::arg("scales") = nb::none(), nb::arg("group") = 0,
        nb::arg("scale_rows") = 1, nb::arg("zeros") = nb::none(), nb::arg("threads") = 1,
        "Pack w [N, D]: f32, bf16, int8 (also for int4, -8 to 7) or E4M3 bits as uint8; scales f32 "
        "[ceil(N / scale_rows), ceil(D / group)] for the last three. zeros int8 of that shape, -8 to 8, for int4: "
        "the value is scale * (w - zero).");
  m.def("linear", &linear, nb::arg("x"), nb::arg("w"), nb::arg("y").noconvert(), nb::arg("threads"),
        "y = x w^T. x f32 [T, D], y f32 [T, N]. x is rounded to bfloat16 unless w is f32; sums are fp32.");

  m.def(
      "expert_ffn", &expert_ffn, nb::arg("x"), nb::arg("ids"), nb::arg("weights"), nb::arg("experts"),
      nb::arg("y").noconvert(), nb::arg("threads"),
      "y += the weighted SwiGLUs of each token's experts. x, y f32 [T, D], ids i32 and weights f32 [T, K]; experts are "
      "pairs (gate and up in alternating panels, down). Experts are added in rising order.");
  m.def("read_seconds", &read_seconds, nb::arg("data"), nb::arg("threads"), "Seconds to read a float32 array once.");

  nb::class_<Cache>(m, "Cache", "Latent rows and index keys of every layer, in f32, bf16 or fp8.")
      .def(
          "__init__",
          [](Cache* self, const nb::dict& dims, const std::vector<bool>& has_index, size_t rows,
             const std::string& format) {
            if (within("rows", rows, 0, LARGE) % PANEL)
              refuse("rows: expected a multiple of 16, found " + std::to_string(rows));
            const Dims d = read_dims(dims);
            const Format f = format_named(format, {Format::f32, Format::bf16, Format::fp8});
            new (self) Cache(d, has_index, rows, f);
          },
          nb::arg("dims"), nb::arg("has_index"), nb::arg("rows"), nb::arg("format"))
      .def_ro("num_rows", &Cache::num_rows)
      .def(
          "rows",
          [](Cache& c, size_t layer) {
            if (layer >= c.layers()) refuse("layer: expected one of " + std::to_string(c.layers()));
            const size_t size = c.row_bytes(layer);
            return nb::ndarray<nb::pytorch, uint8_t>(c.rows(layer), {size});
          },
          nb::arg("layer"), nb::rv_policy::reference_internal, "The bytes of a layer's rows, in place.")
      .def(
          "keys",
          [](Cache& c, size_t layer) {
            if (layer >= c.layers() || !c.key_bytes(layer)) refuse("layer: expected one with an indexer");
            const size_t size = c.key_bytes(layer);
            return nb::ndarray<nb::pytorch, uint8_t>(c.keys(layer), {size});
          },
          nb::arg("layer"), nb::rv_policy::reference_internal,
          "The bytes of a layer's index keys, in panels, in place.")
      .def_prop_ro("num_bytes", &Cache::num_bytes);
  nb::class_<Selection>(m, "Selection", "The rows each token of a forward attends to.").def(nb::init<>());
  nb::class_<Stack>(m, "Stack", "Decoder layers over packed tokens, as one call.")
      .def(
          "__init__",
          [](Stack* self, const nb::dict& dims, size_t threads) {
            new (self) Stack(read_dims(dims), *table, some_threads(threads));
          },
          nb::arg("dims"), nb::arg("threads"))
      .def_prop_rw(
          "threads", [](const Stack& s) { return s.threads; }, [](Stack& s, size_t n) { s.threads = some_threads(n); })
      .def_prop_rw(
          "top_k", [](const Stack& s) { return s.top_k; },
          [](Stack& s, size_t n) { s.top_k = within("top_k", n, 1, LARGE); })
      .def_ro("select_s", &Stack::select_s, "Seconds spent in the indexers' search so far.")
      .def_prop_ro(
          "expert_use",
          [](const Stack& s) {
            std::vector<std::pair<int64_t, int64_t>> use;
            for (const auto& u : s.expert_use) use.emplace_back(u.hits, u.reads);
            return use;
          },
          "Of each layer: products of a token with a routed expert so far, and how often one was read for them.")
      .def("add_layer", &add_layer)
      .def("set_ends", &set_ends, nb::arg("embedding"), nb::arg("norm"), nb::arg("draft"), nb::keep_alive<1, 2>())
      .def("forward", &forward, nb::arg("tokens"), nb::arg("where"), nb::arg("tables"), nb::arg("page_size"),
           nb::arg("cache"), nb::arg("h").noconvert(),
           "h [T, D] of tokens i64 [T]; where i64 [3, T], tables i32 [S, P].")
      .def("extend", &extend, nb::arg("h"), nb::arg("tokens"), nb::arg("where"), nb::arg("tables"),
           nb::arg("page_size"), nb::arg("cache"), nb::arg("last"), nb::arg("selection"), nb::arg("z").noconvert(),
           "The drafting layer's rows of tokens i64 [T] after h [T, D]; z [S, D] and the selection of those at last.")
      .def("draft", &draft, nb::arg("z"), nb::arg("tokens"), nb::arg("positions"), nb::arg("cache"),
           nb::arg("selection"), nb::arg("out").noconvert(),
           "out [S, D] of one more step after z [S, D], with tokens i64 [S] at positions i64 [S]; nothing is written.")
      .def("propose", &propose, nb::arg("head"), nb::arg("h"), nb::arg("tokens"), nb::arg("where"), nb::arg("tables"),
           nb::arg("page_size"), nb::arg("cache"), nb::arg("last"), nb::arg("out").noconvert(),
           "out i64 [S, K]: as ``extend``, then K greedy drafts behind each of the tokens at last i64 [S].")
      .def(
          "linear",
          [](Stack& s, const Weights& w, Array x, Output y) {
            const float* in = floats("x", x, {ANY, ANY});
            require_matrix("w", w, ANY, x.shape(1));
            float* out = floats_out("y", y, {x.shape(0), w->rows});
            const Alone alone(s);
            s.linear(*w, in, w->depth, x.shape(0), out, w->rows);
          },
          nb::arg("w"), nb::arg("x"), nb::arg("y").noconvert());
}
