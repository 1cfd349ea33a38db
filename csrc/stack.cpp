#include "stack.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "best.h"
#include "pool.h"

namespace {

constexpr size_t KEY_BLOCK = 64;  // positions the indexer scores together
constexpr size_t NEIGHBOURS = 8;  // tokens whose searches read the keys together
constexpr size_t SHARED = 65536;  // bytes of weights or of activations to be rounded from which on threads share them
constexpr size_t FEW_ROWS = 262144;  // bytes of selected rows up to which threads share heads, and each reads all rows

// Floats from one token to the next where n are in use: rows a power of two apart share few places of a cache.
size_t spaced(size_t n) { return n % 256 ? n : n + 16; }

size_t blocks(size_t n, size_t of) { return (n + of - 1) / of; }

size_t total_rows(const std::vector<Weights>& all) {
  size_t rows = 0;
  for (const Weights& w : all) rows += w->rows;
  return rows;
}

}  // namespace

Cache::Cache(const Dims& d, const std::vector<bool>& has_index, size_t rows, Format format)
    : num_rows(rows), layout{format, d.latent, d.rotary}, rows_(has_index.size()), keys_(has_index.size()) {
  const size_t panels = round_up(rows, KEY_BLOCK) / PANEL;
  for (size_t i = 0; i < has_index.size(); ++i) {
    rows_[i].reserve(rows * layout.bytes());
    if (has_index[i]) keys_[i].reserve(panels * key_panel_bytes(format, d.index_dim));
  }
}

bool Cache::fits(const Dims& d, const std::vector<Layer>& layers) const {
  const size_t keys = round_up(num_rows, KEY_BLOCK) / PANEL * key_panel_bytes(layout.format, d.index_dim);
  bool fit = layers.size() == rows_.size() && layout.latent == d.latent && layout.rotary == d.rotary;
  for (size_t i = 0; fit && i < layers.size(); ++i) fit = !layers[i].index_weights || keys_[i].size() >= keys;
  return fit;
}

size_t Cache::num_bytes() const {
  size_t total = 0;
  for (const auto& b : rows_) total += b.size();
  for (const auto& b : keys_) total += b.size();
  return total;
}

void Stack::norm(const Vector& w, const float* x, size_t tokens, float* out) {
  const size_t n = w.size();
  pool::each(tokens, 16, threads, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) table_.norm.rms_norm(x + t * n, w.data(), dims_.eps, n, out + t * n);
  });
}

// Rows x as w takes them, until the next that are rounded so.
const void* Stack::tiled(const Matrix& w, const float* x, size_t stride, size_t tokens) {
  const Rounding r = rounding_of(w.format);
  uint8_t* out = tiles_[static_cast<size_t>(r)].reserve(table_.gemm.tiled_bytes(r, tokens, w.depth));
  pool::each(table_.gemm.num_tiles(r, tokens), 1, threads, [&](size_t begin, size_t end) {
    table_.gemm.tile(r, x, stride, nullptr, tokens, w.depth, out, begin, end);
  });
  return out;
}

// Several products with the same tokens as one range of work.
void Stack::products(const std::vector<Product>& list, size_t tokens) {
  size_t units = 0, bytes = 0;
  for (const Product& p : list) {
    units += blocks(p.w->panels(), BLOCK);
    bytes += p.w->bytes() * tokens;
  }
  pool::each(units, bytes < SHARED ? units : 1, threads, [&](size_t begin, size_t end) {
    size_t first = 0;
    for (const Product& p : list) {
      const size_t count = blocks(p.w->panels(), BLOCK);
      const size_t from = std::max(begin, first), to = std::min(end, first + count);
      if (from < to) {
        table_.gemm.linear(*p.w, p.x, tokens, p.y, p.stride, (from - first) * BLOCK,
                           std::min((to - first) * BLOCK, p.w->panels()));
      }
      first += count;
    }
  });
}

// Products of x with matrices that stand one below the other.
std::vector<Stack::Product> Stack::below(const std::vector<Weights>& all, const float* x, size_t x_stride,
                                         size_t tokens, float* y, size_t stride) {
  const void* tiles[3] = {};
  std::vector<Product> list;
  for (const Weights& w : all) {
    const void*& tile = tiles[static_cast<size_t>(rounding_of(w->format))];
    if (!tile) tile = tiled(*w, x, x_stride, tokens);
    list.push_back({w.get(), tile, y, stride});
    y += w->rows;
  }
  return list;
}

void Stack::linear(const Matrix& w, const float* x, size_t stride, size_t tokens, float* y, size_t y_stride) {
  products({{&w, tiled(w, x, stride, tokens), y, y_stride}}, tokens);
}

// Angles in fp64: position * frequency in fp32 is off by hundredths of a radian near a million.
void Stack::angles(const Batch& b) {
  const size_t pairs = dims_.rotary / 2;
  float *cos = cos_.reserve(b.tokens * pairs), *sin = sin_.reserve(b.tokens * pairs);
  pool::each(b.tokens, 16, threads, [&](size_t begin, size_t end) {
    for (size_t i = 0; i < pairs; ++i) {
      const double frequency = std::pow(dims_.theta, -static_cast<double>(2 * i) / static_cast<double>(dims_.rotary));
      for (size_t t = begin; t < end; ++t) {
        cos[t * pairs + i] = static_cast<float>(std::cos(static_cast<double>(b.positions[t]) * frequency));
        sin[t * pairs + i] = static_cast<float>(std::sin(static_cast<double>(b.positions[t]) * frequency));
      }
    }
  });
}

void Stack::embed(const int64_t* tokens, size_t count, float* x) {
  const size_t D = dims_.hidden;
  for (size_t t = 0; t < count; ++t) {
    const size_t at = static_cast<size_t>(tokens[t]) * D;
    if (ends.as_float)
      std::memcpy(x + t * D, static_cast<const float*>(ends.embedding) + at, D * sizeof(float));
    else
      table_.norm.widen(static_cast<const uint16_t*>(ends.embedding) + at, D, x + t * D);
  }
}

void Stack::forward(const int64_t* tokens, const Batch& b, Cache& cache, float* h) {
  float* x = x_.reserve(b.tokens * dims_.hidden);
  embed(tokens, b.tokens, x);
  run(0, layers.size() - (ends.combine ? 1 : 0), b, cache, selection_, true, x);
  norm(ends.norm, x, b.tokens, h);
}

// What the drafting layer takes: [embedding, hidden], each normed, as one [T, D].
float* Stack::combined(const float* h, const int64_t* tokens, size_t T) {
  const size_t D = dims_.hidden;
  float *x = x_.reserve(T * D), *both = both_.reserve(2 * T * D);
  embed(tokens, T, x);
  for (size_t t = 0; t < T; ++t) {
    table_.norm.rms_norm(x + t * D, ends.embedding_norm.data(), dims_.eps, D, both + 2 * t * D);
    table_.norm.rms_norm(h + t * D, ends.hidden_norm.data(), dims_.eps, D, both + (2 * t + 1) * D);
  }
  linear(*ends.combine, both, 2 * D, T, x, D);
  return x;
}

void Stack::extend(const float* h, const int64_t* tokens, const Batch& b, Cache& cache, const int64_t* last,
                   size_t sequences, Selection& s, float* z) {
  const size_t D = dims_.hidden, S = sequences, index = layers.size() - 1;
  const float* x = combined(h, tokens, b.tokens);
  if (S < b.tokens) {  // of the others nothing is needed but their rows
    angles(b);
    project(layers[index], index, b, cache, true, false, x);
  }
  int64_t* where = where_.reserve(3 * S);
  for (size_t i = 0; i < S; ++i) {
    const size_t t = static_cast<size_t>(last[i]);
    where[i] = b.positions[t], where[S + i] = b.rows[t], where[2 * S + i] = b.seqs[t];
    std::copy_n(x + t * D, D, z + i * D);
  }
  s.tokens = S;
  if (!S) return;
  const Batch of_last = {S, where, where + S, where + 2 * S, b.tables, b.table_width, b.page_size};
  run(index, index + 1, of_last, cache, s, true, z);
  norm(ends.draft_norm, z, S, z);
}

void Stack::draft(const float* z, const int64_t* tokens, const int64_t* positions, size_t sequences, Cache& cache,
                  Selection& s, float* out) {
  float* x = combined(z, tokens, sequences);
  const Batch b = {sequences, positions, nullptr, nullptr, nullptr, 0, 0};  // nothing is written or searched
  run(layers.size() - 1, layers.size(), b, cache, s, false, x);
  norm(ends.draft_norm, x, sequences, out);
}

void Stack::propose(const Matrix& head, const float* h, const int64_t* tokens, const Batch& b, Cache& cache,
                    const int64_t* last, size_t sequences, size_t count, int64_t* out) {
  const size_t D = dims_.hidden, W = head.rows;
  float *z = z_.reserve(sequences * D), *logits = vocabulary_.reserve(sequences * W);
  extend(h, tokens, b, cache, last, sequences, selection_, z);
  int64_t *proposed = proposed_.reserve(sequences), *at = positions_.reserve(sequences);
  for (size_t s = 0; s < sequences; ++s) at[s] = b.positions[last[s]];
  for (size_t k = 0; k < count; ++k) {
    if (k) draft(z, proposed, at, sequences, cache, selection_, z);
    linear(head, z, D, sequences, logits, W);
    for (size_t s = 0; s < sequences; ++s) {
      const float* of_sequence = logits + s * W;
      proposed[s] = out[s * count + k] = std::max_element(of_sequence, of_sequence + W) - of_sequence;
      ++at[s];
    }
  }
}

void Stack::run(size_t begin, size_t end, const Batch& b, Cache& cache, Selection& selection, bool write, float* x) {
  angles(b);
  for (size_t i = begin; i < end; ++i) {
    const Layer& l = layers[i];
    attention(l, i, b, cache, selection, write, x);
    norm(l.post_norm, x, b.tokens, h_.reserve(b.tokens * dims_.hidden));
    if (l.router)
      sparse(l, expert_use[i], b.tokens, x);
    else
      dense(l.dense, b.tokens, x);
  }
}

void Stack::attention(const Layer& l, size_t index, const Batch& b, Cache& cache, Selection& s, bool write, float* x) {
  const size_t T = b.tokens, D = dims_.hidden, H = dims_.heads, q_width = spaced(total_rows(l.q));
  const bool selects = l.index_weights && write;
  project(l, index, b, cache, write, selects, x);
  products(below(l.q, q_latent_.data(), dims_.query_rank, T, q_.reserve(T * q_width), q_width), T);
  queries(l, T, q_width);
  if (selects) {
    const auto began = std::chrono::steady_clock::now();
    select(index, b, cache, s, q_width);
    select_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
  attend(l, index, b, cache, s, q_width);
  const void* o = tiled(*l.o, o_.data(), spaced(H * dims_.value), T);
  pool::each(blocks(l.o->panels(), BLOCK), 1, threads, [&](size_t begin, size_t end) {
    table_.gemm.linear_add(*l.o, o, T, nullptr, nullptr, x, D, begin * BLOCK, std::min(end * BLOCK, l.o->panels()));
  });
}

// Products of x, normed, up to the latents; with `selects` the heads' weights of the indexer too.
void Stack::project(const Layer& l, size_t index, const Batch& b, Cache& cache, bool write, bool selects,
                    const float* x) {
  const size_t T = b.tokens, D = dims_.hidden, width = spaced(total_rows(l.a));
  float* h = h_.reserve(T * D);
  norm(l.input_norm, x, T, h);
  std::vector<Product> list = below(l.a, h, D, T, a_.reserve(T * width), width);
  if (selects) {
    const void* tile = tiled(*l.index_weights, h, D, T);
    list.push_back({l.index_weights.get(), tile, index_w_.reserve(T * dims_.index_heads), dims_.index_heads});
  }
  products(list, T);
  latents(l, index, b, cache, write, width);
}

// From q_a and kv_a: the normed query latent, the token's row, and its index key.
void Stack::latents(const Layer& l, size_t index, const Batch& b, Cache& cache, bool write, size_t width) {
  const Dims& d = dims_;
  float *a = a_.data(), *q = q_latent_.reserve(b.tokens * d.query_rank);
  const size_t pairs = d.rotary / 2;
  pool::each(b.tokens, 16, threads, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      float* of_token = a + t * width;
      const float *cos = cos_.data() + t * pairs, *sin = sin_.data() + t * pairs;
      table_.norm.rms_norm(of_token, l.q_norm.data(), d.latent_eps, d.query_rank, q + t * d.query_rank);
      if (!write) continue;
      float* row = of_token + d.query_rank;
      table_.norm.rms_norm(row, l.kv_norm.data(), d.latent_eps, d.latent, row);
      table_.norm.rope(row + d.latent, cos, sin, pairs);
      const size_t at = static_cast<size_t>(b.rows[t]);
      table_.mla.write_row(row, cache.layout, cache.rows(index), at);
      if (!l.index_weights) continue;
      float* key = row + d.latent + d.rotary;
      table_.norm.layer_norm(key, l.index_norm.data(), l.index_bias.data(), d.index_eps, d.index_dim, key);
      table_.norm.rope(key, cos, sin, pairs);
      table_.index.write_key(key, d.index_dim, cache.layout.format, cache.keys(index), at);
    }
  });
}

// Rotates the queries' rotary parts, the heads' last and the index heads' first dimensions.
void Stack::queries(const Layer& l, size_t tokens, size_t width) {
  const Dims& d = dims_;
  const size_t pairs = d.rotary / 2, head = d.nope + d.rotary;
  pool::each(tokens, 16, threads, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      float* q = q_.data() + t * width;
      const float *cos = cos_.data() + t * pairs, *sin = sin_.data() + t * pairs;
      for (size_t h = 0; h < d.heads; ++h) table_.norm.rope(q + h * head + d.nope, cos, sin, pairs);
      if (!l.index_weights) continue;
      for (size_t x = 0; x < d.index_heads; ++x) {
        table_.norm.rope(q + d.heads * head + x * d.index_dim, cos, sin, pairs);
      }
    }
  });
}

void Stack::select(size_t index, const Batch& b, Cache& cache, Selection& s, size_t width) {
  const size_t T = b.tokens, G = top_k;
  const int64_t longest = *std::max_element(b.positions, b.positions + T) + 1;
  s.tokens = T;
  s.num_rows = cache.num_rows;
  s.width = std::min(G, static_cast<size_t>(longest));
  s.ids.reserve(T * s.width), s.counts.reserve(T);
  // Few tokens share each search among the threads; of many, neighbours read the keys together.
  const size_t parts = T >= 2 * threads ? 1 : threads, together = parts > 1 ? 1 : std::min(NEIGHBOURS, T / threads);
  const size_t room = static_cast<size_t>(longest) > G ? 2 * G + KEY_BLOCK : 0;
  uint64_t* best = best_.reserve(T * parts * room);
  std::vector<size_t> found(T * parts);
  pool::each(blocks(T, together) * parts, 1, threads, [&](size_t begin, size_t end) {
    for (size_t u = begin; u < end; ++u) {
      const size_t first = u / parts * together, last = std::min(first + together, T);
      for (size_t t = first, next; t < last; t = next) {
        for (next = t + 1; next < last && b.seqs[next] == b.seqs[t];) ++next;
        search(index, b, cache, width, t, next, {u % parts, parts, room, best, found.data()});
      }
    }
  });
  pool::each(T, 1, threads, [&](size_t begin, size_t end) {
    std::vector<uint64_t> all;
    for (size_t t = begin; t < end; ++t) {
      all.clear();
      for (size_t u = t * parts; u < (t + 1) * parts; ++u)
        all.insert(all.end(), best + u * room, best + u * room + found[u]);
      choose(b, t, all, s);
    }
  });
}

// Tokens [first, last) of one sequence, those that see more than they select.
void Stack::search(size_t index, const Batch& b, Cache& cache, size_t width, size_t first, size_t last,
                   const Search& to) {
  const Dims& d = dims_;
  static thread_local Buffer<uint8_t> tile;
  const Rounding r = rounding_of(cache.layout.format);
  const size_t size = table_.gemm.tiled_bytes(r, d.index_heads, d.index_dim);
  uint8_t* q = tile.reserve(NEIGHBOURS * size);
  const auto visible = [&](size_t t) { return static_cast<size_t>(b.positions[t]) + 1; };
  const size_t longest =
      visible(static_cast<size_t>(std::max_element(b.positions + first, b.positions + last) - b.positions));
  const size_t share = round_up(blocks(longest, to.parts), KEY_BLOCK), from = to.part * share;
  IndexQuery queries[NEIGHBOURS];
  size_t tokens[NEIGHBOURS], count = 0;
  for (size_t t = first; t < last; ++t) {
    if (visible(t) <= top_k) continue;
    table_.gemm.tile(r, q_.data() + t * width + d.heads * (d.nope + d.rotary), d.index_dim, nullptr, d.index_heads,
                     d.index_dim, q + count * size, 0, table_.gemm.num_tiles(r, d.index_heads));
    tokens[count] = t * to.parts + to.part;
    queries[count] = {q + count * size, index_w_.data() + t * d.index_heads, std::min(from + share, visible(t)),
                      to.best + tokens[count] * to.room};
    ++count;
  }
  if (!count) return;
  // relu is homogeneous: both scales, of the dot product and of the heads' weights, may be one.
  const float scale = 1.0f / std::sqrt(static_cast<float>(d.index_dim * d.index_heads));
  const IndexArgs args = {cache.layout.format,
                          d.index_heads,
                          d.index_dim,
                          cache.keys(index),
                          b.tables + static_cast<size_t>(b.seqs[first]) * b.table_width,
                          b.page_size,
                          top_k,
                          scale};
  table_.index.scan(args, from, queries, count);
  for (size_t i = 0; i < count; ++i) to.found[tokens[i]] = queries[i].found;
}

// The best of the candidates, which stand by position, or all rows where they are no more than that; as rows of the
// cache.
void Stack::choose(const Batch& b, size_t t, std::vector<uint64_t>& candidates, Selection& s) {
  const size_t visible = static_cast<size_t>(b.positions[t]) + 1, count = std::min(visible, top_k);
  const int32_t* table = b.tables + static_cast<size_t>(b.seqs[t]) * b.table_width;
  int32_t* out = s.ids.data() + t * s.width;
  s.counts.data()[t] = static_cast<int32_t>(count);
  if (visible > top_k) {
    if (candidates.size() > count) keep_largest(candidates.data(), candidates.size(), count);
    for (size_t i = 0; i < count; ++i)
      out[i] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(candidates[i]));
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(i);
  }
  const auto size = static_cast<int64_t>(b.page_size);
  for (size_t i = 0; i < count;) {  // positions ascend: one division for each page
    const int64_t page = out[i] / size, end = (page + 1) * size, shift = (table[page] - page) * size;
    for (; i < count && out[i] < end; ++i) out[i] = static_cast<int32_t>(out[i] + shift);
  }
}

// Absorbs kv_b_proj into the queries, attends, and brings the latents back to values: o_ [T, H, V].
void Stack::attend(const Layer& l, size_t index, const Batch& b, Cache& cache, const Selection& s, size_t width) {
  const Dims& d = dims_;
  const size_t T = b.tokens, H = d.heads, C = d.latent, head = d.nope + d.rotary;
  const size_t c_stride = spaced(H * C), v_stride = spaced(H * d.value);
  float *absorbed = q_absorbed_.reserve(T * c_stride), *latent = o_latent_.reserve(T * c_stride),
        *o = o_.reserve(T * v_stride);
  const auto absorb = [&](size_t begin, size_t end) {
    by_head(l.key, q_.data(), head, width, T, absorbed, C, c_stride, begin, end);
  };
  const auto bring_back = [&](size_t begin, size_t end) {
    by_head(l.value, latent, C, c_stride, T, o, d.value, v_stride, begin, end);
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(head));
  const auto args = [&](size_t t, size_t begin, size_t end) {
    return MlaArgs{cache.layout,
                   cache.rows(index),
                   end - begin,
                   head,
                   absorbed + t * c_stride + begin * C,
                   q_.data() + t * width + begin * head + d.nope,
                   s.ids.data() + t * s.width,
                   static_cast<size_t>(s.counts.data()[t]),
                   scale};
  };
  const auto alone = [&](const MlaArgs& a, float* out) {
    static thread_local AttentionScratch scratch;
    attend(a, 1, scratch, out);
  };
  if (T < threads && s.width * cache.layout.bytes() <= FEW_ROWS) {
    pool::each(H, blocks(H, threads), threads, [&](size_t begin, size_t end) {
      absorb(begin, end);
      for (size_t t = 0; t < T; ++t) alone(args(t, begin, end), latent + t * c_stride + begin * C);
      bring_back(begin, end);
    });
    return;
  }
  pool::each(H, 1, threads, absorb);
  if (T >= threads) {
    pool::each(T, 1, threads, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t) alone(args(t, 0, H), latent + t * c_stride);
    });
  } else {
    for (size_t t = 0; t < T; ++t) attend(args(t, 0, H), threads, attention_, latent + t * c_stride);
  }
  pool::each(H, 1, threads, bring_back);
}

// One product for each of the heads [begin, end): x [T, H, depth] by its own weights to y.
void Stack::by_head(const std::vector<Weights>& weights, const float* x, size_t x_head, size_t x_stride, size_t tokens,
                    float* y, size_t y_head, size_t y_stride, size_t begin, size_t end) {
  static thread_local Buffer<uint8_t> tile;
  for (size_t i = begin; i < end; ++i) {
    const Matrix& w = *weights[i];
    const Rounding r = rounding_of(w.format);
    uint8_t* tiles = tile.reserve(table_.gemm.tiled_bytes(r, tokens, w.depth));
    table_.gemm.tile(r, x + i * x_head, x_stride, nullptr, tokens, w.depth, tiles, 0, table_.gemm.num_tiles(r, tokens));
    table_.gemm.linear(w, tiles, tokens, y + i * y_head, y_stride, 0, w.panels());
  }
}

// One token's attention by that many threads: out [H, C].
void Stack::attend(MlaArgs a, size_t threads, AttentionScratch& to, float* out) {
  const size_t padded = a.padded(), stride = a.layout.stride();
  if (a.layout.format == Format::fp8) {
    uint16_t* rows = to.rows.reserve(a.count * stride);
    int32_t* ids = to.ids.reserve(a.count);
    for (size_t i = 0; i < a.count; ++i) ids[i] = static_cast<int32_t>(i);
    pool::each(a.count, 16, threads, [&](size_t begin, size_t end) { table_.mla.widen(a, begin, end, rows); });
    a.layout.format = Format::bf16, a.rows = rows, a.ids = ids;
  }
  float* scores = to.scores.reserve(a.heads * a.apart());
  const Softened s = {to.probabilities.reserve(a.heads * padded), to.inverse.reserve(a.heads)};
  const size_t pieces = padded / SCORE_PAD;  // one stretch for each thread, which prepares the queries for it
  pool::each(pieces, blocks(pieces, threads), threads,
             [&](size_t begin, size_t end) { table_.mla.score(a, begin * SCORE_PAD, end * SCORE_PAD, scores); });
  pool::each(a.heads, 1, threads, [&](size_t begin, size_t end) { table_.mla.soften(a, begin, end, scores, s); });
  const size_t width = round_up(a.layout.latent, ROW_PAD), unit = 2 * ROW_PAD;
  pool::each(blocks(width, unit), 1, threads,
             [&](size_t begin, size_t end) { table_.mla.mix(a, s, begin * unit, std::min(end * unit, width), out); });
}

// The dense MLP of h_ added to x.
void Stack::dense(const Expert& e, size_t T, float* x) {
  const size_t D = dims_.hidden, pairs = e.gate_up->panels() / 2, F = spaced(pairs * PANEL);
  const void* tile = tiled(*e.gate_up, h_.data(), D, T);
  float* hidden = hidden_.reserve(T * F);
  pool::each(blocks(pairs, 2), 1, threads, [&](size_t begin, size_t end) {
    table_.gemm.gated(*e.gate_up, tile, T, hidden, F, begin * 2, std::min(end * 2, pairs));
  });
  const void* down = tiled(*e.down, hidden, F, T);
  pool::each(blocks(e.down->panels(), BLOCK), 1, threads, [&](size_t begin, size_t end) {
    table_.gemm.linear_add(*e.down, down, T, nullptr, nullptr, x, D, begin * BLOCK,
                           std::min(end * BLOCK, e.down->panels()));
  });
}

void Stack::sparse(const Layer& l, ExpertUse& use, size_t T, float* x) {
  const Dims& d = dims_;
  const size_t E = d.experts, K = d.experts_per_token;
  float *logits = logits_.reserve(T * E), *weights = weights_.reserve(T * K);
  products({{l.router.get(), tiled(*l.router, h_.data(), d.hidden, T), logits, E}}, T);
  int32_t* ids = ids_.reserve(T * K);
  pool::each(T, 16, threads, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      table_.norm.route(logits + t * E, l.router_bias.data(), E, K, d.route_scale, d.normalize_weights, ids + t * K,
                        weights + t * K);
    }
  });
  experts(l.experts, l.dense, T, K, ids, weights, h_.data(), x);
  use.hits += static_cast<int64_t>(T * K);
  use.reads += std::count_if(items_.begin(), items_.end(), [](const Item& m) { return m.token; });
}

// The work of each expert that has any: its tokens, their weights, and where its activations lie. The shared expert
// takes every token and comes first, then experts upwards: the order in which they are added, whatever the batch.
void Stack::group(const std::vector<Expert>& all, const Expert& shared, size_t T, size_t K, const int32_t* ids,
                  const float* weights) {
  const size_t E = all.size();
  std::vector<size_t>& first = first_;
  first.assign(E + 1, 0);
  for (size_t i = 0; i < T * K; ++i) ++first[static_cast<size_t>(ids[i]) + 1];
  for (size_t e = 0; e < E; ++e) first[e + 1] += first[e];
  int32_t* token = sorted_tokens_.reserve(T * K);
  float* weight = sorted_weights_.reserve(T * K);
  next_.assign(first.begin(), first.end() - 1);
  for (size_t i = 0; i < T * K; ++i) {
    const size_t at = next_[static_cast<size_t>(ids[i])]++;
    token[at] = static_cast<int32_t>(i / K);
    weight[at] = weights[i];
  }
  items_.clear();
  size_t hidden = 0, in = 0, out = 0, blocks_before = 0;
  const auto add = [&](const Expert& e, const int32_t* tokens, const float* w, size_t n) {
    const size_t F = e.gate_up->panels() / 2 * PANEL;
    items_.push_back({&e, tokens, w, n, F, hidden, in, out, blocks_before});
    hidden += n * spaced(F);
    in += table_.gemm.tiled_bytes(rounding_of(e.gate_up->format), n, e.gate_up->depth);
    out += table_.gemm.tiled_bytes(rounding_of(e.down->format), n, e.down->depth);
    blocks_before += blocks(F / PANEL, 2);
  };
  if (shared.gate_up) add(shared, nullptr, nullptr, T);
  for (size_t e = 0; e < E; ++e) {
    if (first[e + 1] > first[e]) add(all[e], token + first[e], weight + first[e], first[e + 1] - first[e]);
  }
  items_.push_back({nullptr, nullptr, nullptr, 0, 0, hidden, in, out, blocks_before});  // the totals
}

// Experts of h [T, D], weighted, added to x [T, D].
void Stack::experts(const std::vector<Expert>& all, const Expert& shared, size_t T, size_t K, const int32_t* ids,
                    const float* weights, const float* h, float* x) {
  group(all, shared, T, K, ids, weights);
  const size_t count = items_.size() - 1, D = items_[0].expert->gate_up->depth;
  uint8_t *in = expert_in_.reserve(items_.back().in), *out = expert_out_.reserve(items_.back().out);
  float* hidden = hidden_.reserve(items_.back().hidden);
  const size_t chunk = items_.back().in + items_.back().out < SHARED ? count : 1;
  const auto each_item = [&](auto work) {
    pool::each(count, chunk, threads, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) work(items_[i]);
    });
  };
  each_item([&](const Item& m) {
    const Rounding r = rounding_of(m.expert->gate_up->format);
    table_.gemm.tile(r, h, D, m.token, m.tokens, D, in + m.in, 0, table_.gemm.num_tiles(r, m.tokens));
  });
  pool::each(items_.back().first_block, 2, threads, [&](size_t begin, size_t end) {
    for (size_t i = 0; i < count; ++i) {
      const Item& m = items_[i];
      const size_t from = std::max(begin, m.first_block), to = std::min(end, items_[i + 1].first_block);
      if (from >= to) continue;
      table_.gemm.gated(*m.expert->gate_up, in + m.in, m.tokens, hidden + m.hidden, spaced(m.F),
                        2 * (from - m.first_block), std::min(2 * (to - m.first_block), m.F / PANEL));
    }
  });
  each_item([&](const Item& m) {
    const Matrix& down = *m.expert->down;
    const Rounding r = rounding_of(down.format);
    table_.gemm.tile(r, hidden + m.hidden, spaced(m.F), nullptr, m.tokens, down.depth, out + m.out, 0,
                     table_.gemm.num_tiles(r, m.tokens));
  });
  const size_t panels = items_[0].expert->down->panels();
  pool::each(blocks(panels, BLOCK), 1, threads, [&](size_t begin, size_t end) {
    for (size_t i = 0; i < count; ++i) {
      const Item& m = items_[i];
      table_.gemm.linear_add(*m.expert->down, out + m.out, m.tokens, m.token, m.weight, x, D, begin * BLOCK,
                             std::min(end * BLOCK, panels));
    }
  });
}
