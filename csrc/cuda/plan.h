// How one weight is cut. A plan depends only on the shape, the element size and the 16-byte
// alignment of its weight, never on neighbours or on the card. It fixes which numbers are added up
// in which order: a long row, or a strip, is cut into parts; each part has its own sum (or one per
// column), and these sums are added up in the order of the parts. So the bits of a weight are the
// same alone and in a list, from run to run and on all cards of one architecture.
//
// parts_of_block() chooses for the card how many neighbouring parts a block takes. This changes no
// bit, because a block starts a new sum for each of its parts. docs/cuda.md explains the numbers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../weight_norm.h"

namespace wnkernel::cuda {

constexpr int kThreads = 256;  // threads of a block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVectorBytes = 16;  // the widest access of a thread
// How many vectors of so many elements a thread loads at a time. Single elements are fewer bytes,
// so a thread loads more of them.
constexpr int vectors(int elements) { return elements == 1 ? 8 : 4; }
// kRowVectors is how many vectors a thread holds of a row of more than a warp; most_row_vectors()
// is the most that it may hold. A row of v and one of grad_w take 64 registers. Vectors of 8 take
// twice the instructions, and half as many hold a row of 8,192.
constexpr int kRowVectors = 4;
constexpr int most_row_vectors(int elements) { return elements == 8 ? kRowVectors : 8; }
constexpr int kStripBytes = 128;  // a cache line
// The most columns of a strip: halves in whole vectors.
constexpr int kMostColumns = kStripBytes / 2;
// The number of parts into which all rows or strips of a weight together are cut, if they are long
// enough. It fills a large card once: about 130 processors with room for three blocks each. On a
// smaller card each block takes several parts.
constexpr int64_t kFill = 384;
// From this many tiles on, a split is worth its second launch, which takes about 3 us. Consecutive
// tiles take 0.7 us each, the latency of memory, and every tile is summed and later scaled. So 8
// tiles take one block 11 us, but 8 blocks 5 us, including the second launch and the partial sums.
constexpr int64_t kSplitFrom = 8;
// The fewest tiles in a part of a strip. For each part a block reads the sum of every column, 256
// bytes in a forward, while a tile has 16 KB. For a part of a row it reads only 8 bytes.
constexpr int64_t kStripTiles = 2;
// A strip has more than kStripParts parts only if each has at least kTilesOfMoreParts tiles.
constexpr int64_t kStripParts = 128, kTilesOfMoreParts = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int ceil_log2(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

enum class Kind : uint8_t {
  rows,    // short contiguous rows: in registers from the load to the store, read once
  runs,    // long rows, and rows in runs of `inner` elements: row by row, tile by tile
  strips,  // strips of adjacent columns of [outer, rows * inner], tile by tile
};

struct Plan {
  // Lines are contiguous and `pitch` elements apart; a vector is `vector` elements of a line. A
  // tile has vectors(vector) vectors for each thread. It covers kThreads >> log_x lines by 1 <<
  // log_x vectors, repeated 1 << log_across times side by side, and otherwise one below the other.
  // For rows, a thread has 1 << log_across vectors of a line; if these are fewer than kRowVectors,
  // it has several lines.
  int64_t rows, inner;
  int64_t lines;  // lines of the matrix that tiles cover
  int64_t pitch;
  int64_t numel;
  int64_t width;       // in vectors: of a row, of a run, or of a line of a full strip
  int32_t strip_rows;  // strips: rows of one strip
  int32_t across;      // runs and strips: tiles side by side
  int32_t tiles;       // tiles of a row or strip
  int32_t per_part;    // tiles of a part
  int32_t parts;       // parts of a row or strip; a second launch adds up several
  Kind kind;
  uint8_t vector;
  uint8_t log_x;
  uint8_t log_across;
};

// The number of rows or strips that may be cut into parts; for short rows, the number of blocks.
inline int64_t whole(const Plan& p) {
  switch (p.kind) {
    case Kind::rows: {
      const int64_t lines = (kThreads >> p.log_x) * std::max(1, kRowVectors >> p.log_across);
      return ceil_div(p.rows, lines);
    }
    case Kind::runs:
      return p.rows;
    default:
      return ceil_div(p.rows, p.strip_rows);
  }
}

// The number of blocks of a weight, if a block takes per_block parts.
inline int64_t blocks(const Plan& p, int per_block) {
  return whole(p) * ceil_div(p.parts, per_block);
}

// How many parts a block takes on a card that runs `places` blocks at a time. Blocks come in waves
// of `places`, and a wave lasts as long as the parts of one block. The choice makes all waves
// together as short as possible. Among equals it takes the fewest waves, because each block of the
// second launch reads the sums of all parts.
inline int parts_of_block(const Plan& p, int64_t places) {
  const int64_t of_weight = whole(p), fewest = ceil_div(of_weight, places);
  int64_t best = p.parts, shortest = fewest * p.parts;
  for (int64_t waves = fewest; waves < shortest; ++waves) {
    const int64_t per_block = ceil_div(p.parts, waves * places / of_weight);
    if (waves * per_block < shortest) {
      best = per_block;
      shortest = waves * per_block;
    }
  }
  return static_cast<int>(best);
}

// The number of columns of a strip that have partial sums.
constexpr int strip_columns(int vector, int element_bytes) {
  return vector > 1 ? kStripBytes / element_bytes : kWarp;
}

// The number of threads side by side in a strip, with one vector each, is 1 << strip_log_x().
constexpr int strip_log_x(int vector) {
  return ceil_log2(vector > 1 ? kStripBytes / kVectorBytes : kWarp);
}

// The number of partial sums that all parts of a split weight store.
inline int64_t partial_sums(const Plan& p, int element_bytes) {
  if (p.parts == 1) return 0;
  return whole(p) * p.parts * (p.kind == Kind::strips ? strip_columns(p.vector, element_bytes) : 1);
}

// `most` is the largest number of parts of a row or a strip.
inline void split_tiles(Plan& p, int64_t most) {
  const int64_t wanted = p.tiles < kSplitFrom ? 1 : std::min(kFill / whole(p), most);
  p.per_part = static_cast<int32_t>(ceil_div(p.tiles, std::max<int64_t>(wanted, 1)));
  p.parts = static_cast<int32_t>(ceil_div(p.tiles, p.per_part));
}

// A row of up to a warp of vectors gets one thread per vector. A longer row gets a fourth as many
// threads, up to a block, with kRowVectors vectors each. Beyond that, a block takes it with twice
// as many vectors per thread.
inline void plan_rows(Plan& p) {
  p.kind = Kind::rows;
  const int log = ceil_log2(p.width), log_block = ceil_log2(kThreads);
  const int log_across = log <= ceil_log2(kWarp) ? 0 : ceil_log2(kRowVectors);
  p.log_x = static_cast<uint8_t>(std::min(log - log_across, log_block));
  p.log_across = static_cast<uint8_t>(log - p.log_x);
}

inline void plan_runs(Plan& p) {
  p.kind = Kind::runs;
  const int log = ceil_log2(p.width), log_block = ceil_log2(kThreads);
  p.log_x = static_cast<uint8_t>(std::min(log, log_block));
  p.log_across = static_cast<uint8_t>(std::min(log - p.log_x, ceil_log2(vectors(p.vector))));
  p.across = static_cast<int32_t>(ceil_div(p.width, int64_t{1} << (p.log_x + p.log_across)));
  const int64_t tile_lines = (kThreads >> p.log_x) * (vectors(p.vector) >> p.log_across);
  p.tiles = static_cast<int32_t>(ceil_div(p.lines, tile_lines) * p.across);
  split_tiles(p, p.tiles);
}

// The largest count up to `most` for which count * size is a multiple of vector; `most` if there is
// none.
inline int64_t whole_vectors(int64_t most, int64_t size, int64_t vector) {
  for (int64_t n = most; n > 0; --n)
    if (n * size % vector == 0) return n;
  return most;
}

// Whether strips can be cut into vectors of p.vector elements. Fills the plan if so.
inline bool plan_strips(Plan& p, int64_t outer, int element_bytes) {
  p.kind = Kind::strips;
  const int64_t most = strip_columns(p.vector, element_bytes), line = p.rows * p.inner;
  int64_t columns;
  if (line <= most) {  // all columns, and several lines of the matrix side by side
    const int64_t fold = whole_vectors(std::min(most / line, outer), line, p.vector);
    p.strip_rows = static_cast<int32_t>(p.rows);
    p.pitch = columns = fold * line;
    p.lines = ceil_div(outer, fold);
  } else {
    p.strip_rows =
        static_cast<int32_t>(whole_vectors(std::min(most / p.inner, p.rows), p.inner, p.vector));
    columns = p.strip_rows * p.inner;
    p.pitch = line;
    p.lines = outer;
  }
  if (p.pitch % p.vector || columns % p.vector || p.numel % p.vector) return false;
  p.width = columns / p.vector;
  p.log_x = static_cast<uint8_t>(strip_log_x(p.vector));
  p.log_across = 0;
  p.across = 1;
  const int64_t tile_lines = (kThreads >> p.log_x) * vectors(p.vector);
  p.tiles = static_cast<int32_t>(ceil_div(p.lines, tile_lines));
  split_tiles(p,
              std::min(p.tiles / kStripTiles, std::max(kStripParts, p.tiles / kTilesOfMoreParts)));
  return true;
}

// The view must not be empty. `vector` is the number of elements in the widest access that the
// addresses of all arrays allow; 1 means single elements.
inline Plan make_plan(const RowView& view, int element_bytes, int vector) {
  Plan p{};
  p.rows = view.rows;
  p.inner = view.inner;
  p.numel = view.numel();
  p.tiles = p.per_part = p.parts = p.across = 1;
  const auto set_vector = [&](int elements) {
    p.vector = static_cast<uint8_t>(elements);
    p.width = p.inner / elements;
  };
  const bool in_vectors = view.inner % vector == 0;
  const auto strips = [&](int elements) {
    set_vector(elements);
    return view.outer > 1 && view.inner <= strip_columns(elements, element_bytes) &&
           plan_strips(p, view.outer, element_bytes);
  };
  if (strips(vector) || (!in_vectors && strips(1))) return p;
  set_vector(in_vectors ? vector : 1);
  p.lines = view.outer;
  p.pitch = view.rows * view.inner;
  if (view.outer == 1 && p.width <= kThreads * most_row_vectors(p.vector))
    plan_rows(p);
  else
    plan_runs(p);
  return p;
}

}  // namespace wnkernel::cuda
