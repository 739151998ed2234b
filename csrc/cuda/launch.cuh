// Turns problems of the same types into launches: plans, tables, workspace. This is host code, with
// one instance for each pair of types (types_*.cu).
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "card.h"
#include "kernels.cuh"
#include "launch.h"

namespace wnkernel::cuda {

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
inline bool is_aligned(const Forward& p) { return is_aligned(p.v) && is_aligned(p.w); }
inline bool is_aligned(const Backward& p) {
  return is_aligned(p.v) && is_aligned(p.grad_w) && is_aligned(p.grad_v);
}

// A forced norm of a row of zeros is bounded by the smallest number, if it is not bounded anyway.
inline ForwardLine line_of(const Forward& p) {
  const double least = p.forced > 0 ? std::numeric_limits<double>::denorm_min() : 0;
  const double eps = p.eps == 0 ? least : p.eps;
  return {p.v, p.g, p.w, p.norm, nullptr, eps, p.forced, {}, 1, p.g_type, p.divisor_type};
}
inline BackwardLine line_of(const Backward& p) {
  return {p.grad_w, p.v, p.g, p.norm, p.grad_v, p.grad_g, nullptr, p.eps, {}, 1, p.g_type};
}
constexpr int planes(const ForwardLine&) { return kForwardPlanes; }
constexpr int planes(const BackwardLine&) { return kBackwardPlanes; }

// Weights whose blocks take long come first, so that no such block runs alone at the end. Each
// weight is cut as if it had the card to itself.
template <class Line, class V, class W, int Capacity, int Of, bool Finish>
cudaError_t launch(std::vector<Line>& lines, cudaStream_t stream) {
  const auto kernel = weight_norm_kernel<Line, V, W, Capacity, Of, Finish>;
  if constexpr (Of & kTiles) {
    static Places places_of_kernel;
    int64_t places = 0;
    if (const cudaError_t error = places_of_kernel.get(kernel, places); error != cudaSuccess)
      return error;
    for (Line& line : lines) line.per_block = parts_of_block(line.plan, places);
    const auto tiles = [](const Line& line) {
      return std::min(int64_t{line.plan.per_part} * line.per_block, int64_t{line.plan.tiles});
    };
    std::stable_sort(lines.begin(), lines.end(),
                     [&](const Line& a, const Line& b) { return tiles(a) > tiles(b); });
  }
  Table<Line, Capacity> table;
  table.count = static_cast<int32_t>(lines.size());
  int64_t first = 0;
  for (size_t k = 0; k < lines.size(); ++k) {
    table.lines[k] = lines[k];
    table.first[k] = static_cast<int32_t>(first);
    first += blocks(lines[k].plan, lines[k].per_block);
  }
  table.first[lines.size()] = static_cast<int32_t>(first);
  WNKERNEL_LAUNCH(kernel, static_cast<unsigned>(first), kThreads, stream, table);
  return cudaGetLastError();
}

// Launches with the smallest table that holds the lines, because the driver copies the whole table.
// One is the kinds that a single weight may have; Of is the kinds that a list may have.
template <class Line, class V, class W, int One, int Of, bool Finish>
cudaError_t launch_smallest(std::vector<Line>& lines, cudaStream_t stream) {
  const auto count = static_cast<int>(lines.size());
  const auto launched = count == 1           ? launch<Line, V, W, 1, One, Finish>
                        : count <= kFewLines ? launch<Line, V, W, kFewLines, Of, Finish>
                                             : launch<Line, V, W, kMostLines, Of, Finish>;
  return launched(lines, stream);
}

// Launches at most one full table.
template <class Line, class V, class W>
cudaError_t launch_table(std::vector<Line>& lines, const CudaLaunch& on) {
  const auto stream = static_cast<cudaStream_t>(on.stream);
  int64_t sums = 0;
  const auto workspace = [](const Line& line) {
    return partial_sums(line.plan, sizeof(V)) * planes(line);
  };
  for (const Line& line : lines) sums += workspace(line);
  if (sums > 0) {
    using Sum = typename Element<V>::Sum;
    auto* partials = static_cast<Sum*>(on.workspace(on.context, sums * int64_t{sizeof(Sum)}));
    for (Line& line : lines) {
      line.partials = partials;
      partials += workspace(line);
    }
  }
  const bool rows_only = std::all_of(lines.begin(), lines.end(),
                                     [](const Line& line) { return line.plan.kind == Kind::rows; });
  const cudaError_t error = rows_only
                                ? launch_smallest<Line, V, W, kRows, kRows, false>(lines, stream)
                                : launch_smallest<Line, V, W, kTiles, kAll, false>(lines, stream);
  if (error != cudaSuccess || sums == 0) return error;
  lines.erase(std::remove_if(lines.begin(), lines.end(),
                             [](const Line& line) { return line.plan.parts == 1; }),
              lines.end());
  return launch_smallest<Line, V, W, kTiles, kTiles, true>(lines, stream);
}

template <class V, class W, class Problem>
int launch_all(const Problem* const* problems, int64_t count, const CudaLaunch& on) {
  using Line = decltype(line_of(**problems));
  std::vector<Line> lines;
  lines.reserve(static_cast<size_t>(std::min<int64_t>(count, kMostLines)));
  int64_t grid = 0;
  const auto flush = [&] {
    const cudaError_t error = lines.empty() ? cudaSuccess : launch_table<Line, V, W>(lines, on);
    lines.clear();
    grid = 0;
    return error;
  };
  for (int64_t k = 0; k < count; ++k) {
    const Problem& p = *problems[k];
    Line line = line_of(p);
    line.plan = make_plan(p.view, sizeof(V), is_aligned(p) ? kVectorBytes / int{sizeof(V)} : 1);
    const int64_t more = blocks(line.plan, 1);  // an upper bound for any card
    if (more > kMostBlocks) return static_cast<int>(cudaErrorInvalidConfiguration);
    if (static_cast<int>(lines.size()) == kMostLines || grid + more > kMostBlocks)
      if (const cudaError_t error = flush(); error != cudaSuccess) return static_cast<int>(error);
    lines.push_back(line);
    grid += more;
  }
  return static_cast<int>(flush());
}

}  // namespace wnkernel::cuda
