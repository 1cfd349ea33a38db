// A whole decoder over packed tokens as one call: every layer's products, attention and experts, without Python
// between.
//
// Knows the architecture and no instruction set: it calls a table of kernels. Sums are taken in one order for each
// token, so a token's bits depend neither on the others in the batch nor on the threads.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "table.h"

using Weights = std::shared_ptr<Matrix>;
using Vector = std::vector<float>;

struct Dims {
  size_t hidden, heads, query_rank, latent, nope, rotary, value;
  size_t index_heads, index_dim, top_k;
  size_t experts, experts_per_token;
  float eps, latent_eps, index_eps, route_scale;
  bool normalize_weights;
  double theta;
};

struct Expert {
  Weights gate_up, down;  // panels of gate and up alternate
};

struct Layer {
  Vector input_norm, post_norm, q_norm, kv_norm;
  std::vector<Weights> a;           // rows of q_a_proj, kv_a_proj_with_mqa and, with an indexer, wk
  std::vector<Weights> q;           // rows of q_b_proj and, with an indexer, wq_b
  std::vector<Weights> key, value;  // of each head: kv_b_proj's key rows transposed [C, A], value rows [V, C]
  Weights o;
  Weights index_weights;  // weights_proj; null where the indices of a layer below are shared
  Vector index_norm, index_bias;
  Weights router;  // null in a dense layer
  Vector router_bias;
  std::vector<Expert> experts;
  Expert dense;  // the dense MLP or the shared expert
};

// Rows of every layer, and index keys of those with an indexer, in f32, bf16 or fp8. Memory is touched when it is first
// written.
class Cache {
 public:
  Cache(const Dims& d, const std::vector<bool>& has_index, size_t rows, Format format);
  Cache(const Cache&) = delete;
  // Whether it has room for rows and keys of these layers.
  bool fits(const Dims& d, const std::vector<Layer>& layers) const;
  void* rows(size_t layer) { return rows_[layer].data(); }
  void* keys(size_t layer) { return keys_[layer].data(); }
  size_t layers() const { return rows_.size(); }
  size_t row_bytes(size_t layer) const { return rows_[layer].size(); }
  size_t key_bytes(size_t layer) const { return keys_[layer].size(); }
  size_t num_bytes() const;
  const size_t num_rows;
  const RowLayout layout;

 private:
  std::vector<Buffer<uint8_t>> rows_, keys_;
};

// Where the tokens of a forward sit: position, row, sequence; a table of pages for each sequence.
struct Batch {
  size_t tokens;
  const int64_t *positions, *rows, *seqs;
  const int32_t* tables;
  size_t table_width, page_size;
};

// Rows each token attends to: ids [tokens, width] in a cache of num_rows, count of each.
struct Selection {
  Buffer<int32_t> ids, counts;
  size_t tokens = 0, width = 0, num_rows = 0;
};

// What stands before and after the layers. embedding [vocabulary, D], float or bfloat16, is not owned. The last four
// belong to the layer that drafts, which is the last one if they are there.
struct Ends {
  const void* embedding = nullptr;
  bool as_float = false;
  size_t vocabulary = 0;
  Vector norm;
  Vector embedding_norm, hidden_norm, draft_norm;
  Weights combine;
};

struct AttentionScratch {
  Buffer<float> scores, probabilities, inverse;
  Buffer<uint16_t> rows;
  Buffer<int32_t> ids;
};

class Stack {
 public:
  Stack(const Dims& dims, const Table& table, size_t threads)
      : threads(threads), top_k(dims.top_k), dims_(dims), table_(table) {}
  std::vector<Layer> layers;
  Ends ends;
  size_t threads, top_k;
  double select_s = 0.0;  // spent in the indexers' search so far
  // Of each layer's routed experts so far: products of a token with one, and how often one was read for some of them.
  // May be looked at while layers run.
  struct ExpertUse {
    std::atomic<int64_t> hits{0}, reads{0};
  };
  std::deque<ExpertUse> expert_use;
  std::mutex busy;  // for whoever calls from several threads
  const Dims& dims() const { return dims_; }

  // h [T, D]: the tokens through all layers but the drafting one, normed; their rows are written.
  void forward(const int64_t* tokens, const Batch& b, Cache& cache, float* h);
  // The drafting layer over h [T, D] and the tokens that follow, whose rows are written; of those at `last` [S], which
  // ascends, z [S, D] and the selection.
  void extend(const float* h, const int64_t* tokens, const Batch& b, Cache& cache, const int64_t* last,
              size_t sequences, Selection& s, float* z);
  // One more step, from z [S, D] and the tokens that follow, at those positions over the same selection. out may be z.
  void draft(const float* z, const int64_t* tokens, const int64_t* positions, size_t sequences, Cache& cache,
             Selection& s, float* out);
  // ``extend``, then drafts: the likeliest token of z by ``head``, and that of each further step: out [S, count].
  void propose(const Matrix& head, const float* h, const int64_t* tokens, const Batch& b, Cache& cache,
               const int64_t* last, size_t sequences, size_t count, int64_t* out);
  // x [T, D] through layers [begin, end). `write`: the tokens' rows are written and full layers select; otherwise the
  // selection given is used as it stands.
  void run(size_t begin, size_t end, const Batch& b, Cache& cache, Selection& selection, bool write, float* x);
  void norm(const Vector& w, const float* x, size_t tokens, float* out);
  // y [T, rows of w]
  void linear(const Matrix& w, const float* x, size_t stride, size_t tokens, float* y, size_t y_stride);
  // x [T, D] += experts of h [T, D], ids and weights [T, K]; `shared` may be empty
  void experts(const std::vector<Expert>& all, const Expert& shared, size_t T, size_t K, const int32_t* ids,
               const float* weights, const float* h, float* x);

 private:
  struct Product {
    const Matrix* w;
    const void* x;
    float* y;
    size_t stride;
  };
  void products(const std::vector<Product>& list, size_t tokens);
  std::vector<Product> below(const std::vector<Weights>& all, const float* x, size_t x_stride, size_t tokens, float* y,
                             size_t stride);
  const void* tiled(const Matrix& w, const float* x, size_t stride, size_t tokens);
  void embed(const int64_t* tokens, size_t count, float* x);
  float* combined(const float* h, const int64_t* tokens, size_t count);
  void angles(const Batch& b);
  void attention(const Layer& l, size_t index, const Batch& b, Cache& cache, Selection& s, bool write, float* x);
  void project(const Layer& l, size_t index, const Batch& b, Cache& cache, bool write, bool selects, const float* x);
  void latents(const Layer& l, size_t index, const Batch& b, Cache& cache, bool write, size_t width);
  void queries(const Layer& l, size_t tokens, size_t width);
  // One of the parts that a search is cut into, and where all leave what they find, [T * parts, room] and [T * parts].
  struct Search {
    size_t part, parts, room;
    uint64_t* best;
    size_t* found;
  };
  void select(size_t index, const Batch& b, Cache& cache, Selection& s, size_t width);
  void search(size_t index, const Batch& b, Cache& cache, size_t width, size_t first, size_t last, const Search& to);
  void choose(const Batch& b, size_t t, std::vector<uint64_t>& candidates, Selection& s);
  void by_head(const std::vector<Weights>& weights, const float* x, size_t x_head, size_t x_stride, size_t tokens,
               float* y, size_t y_head, size_t y_stride, size_t begin, size_t end);
  void attend(const Layer& l, size_t index, const Batch& b, Cache& cache, const Selection& s, size_t width);
  void attend(MlaArgs a, size_t threads, AttentionScratch& to, float* out);
  void dense(const Expert& e, size_t tokens, float* x);
  void sparse(const Layer& l, ExpertUse& use, size_t tokens, float* x);
  void group(const std::vector<Expert>& all, const Expert& shared, size_t T, size_t K, const int32_t* ids,
             const float* weights);
  // An expert and its tokens. hidden, in, out: where its activations begin; first_block: where its work does.
  struct Item {
    const Expert* expert;
    const int32_t* token;
    const float* weight;
    size_t tokens, F, hidden, in, out, first_block;
  };

  Dims dims_;
  const Table& table_;
  // Scratch, kept between calls.
  Selection selection_;
  AttentionScratch attention_;
  Buffer<float> x_, both_, cos_, sin_, h_, a_, q_latent_, q_, index_w_, q_absorbed_, o_latent_, o_, logits_, hidden_,
      weights_, vocabulary_, z_;
  Buffer<int64_t> proposed_, positions_, where_;
  Buffer<uint8_t> tiles_[3], expert_in_, expert_out_;  // one for each rounding
  Buffer<float> sorted_weights_;
  Buffer<int32_t> ids_, sorted_tokens_;
  std::vector<size_t> first_, next_;
  std::vector<Item> items_;
  Buffer<uint64_t> best_;
};
