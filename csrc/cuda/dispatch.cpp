// Splits problems of mixed types into one or two launches for each pair of types.
#include <vector>

#include "launch.h"

namespace wnkernel {
namespace {

template <class Problem, class Launch>
int launch_pair(const Problem* problems, int64_t count, DType v_type, DType w_type, Launch launch,
                const CudaLaunch& on) {
  std::vector<const Problem*> chosen;
  for (int64_t k = 0; k < count; ++k)
    if (problems[k].v_type == v_type && problems[k].w_type == w_type)
      chosen.push_back(&problems[k]);
  return chosen.empty() ? 0 : launch(chosen.data(), static_cast<int64_t>(chosen.size()), on);
}

}  // namespace

#define WNKERNEL_FORWARD(name, v, w)                                                  \
  if (const int error =                                                               \
          launch_pair(problems, count, DType::v, DType::w, cuda::forward_##name, on)) \
    return error;
#define WNKERNEL_BACKWARD(name, v, w)                                                  \
  if (const int error =                                                                \
          launch_pair(problems, count, DType::v, DType::w, cuda::backward_##name, on)) \
    return error;

int forward_cuda(const Forward* problems, int64_t count, const CudaLaunch& on) {
  WNKERNEL_PAIRS(WNKERNEL_FORWARD)
  return 0;
}

int backward_cuda(const Backward* problems, int64_t count, const CudaLaunch& on) {
  WNKERNEL_PAIRS(WNKERNEL_BACKWARD)
  return 0;
}

}  // namespace wnkernel
