#include "bound_launch.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "executor.h"

namespace flashinfer::host {

BoundLaunch::BoundLaunch(std::vector<Step> steps, std::vector<unsigned char> params,
                         std::vector<std::vector<size_t>> slots)
    : steps_(std::move(steps)), params_(std::move(params)), slots_(std::move(slots)) {
  if (params_.size() > kMaxBytes) {
    throw std::invalid_argument("the parameters may have " + std::to_string(kMaxBytes) + " bytes, got " +
                                std::to_string(params_.size()));
  }
  for (const std::vector<size_t>& slot : slots_) {
    for (const size_t offset : slot) {
      if (offset + sizeof(uint64_t) > params_.size()) {
        throw std::invalid_argument("an address belongs at byte " + std::to_string(offset) + ", beyond the parameters");
      }
    }
  }
}

void BoundLaunch::launch(const uint64_t* addresses, uintptr_t where) const {
  alignas(16) unsigned char params[kMaxBytes];
  std::memcpy(params, params_.data(), params_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    for (const size_t offset : slots_[i]) std::memcpy(params + offset, addresses + i, sizeof(uint64_t));
  }
  for (const Step& step : steps_) {
    if (step.cuda != nullptr) {
      step.cuda->launch(params + step.params, step.workers, where, step.programmatic);
    } else {
      execute(step.cpu->entry(), params + step.params, static_cast<int32_t>(step.workers), static_cast<int32_t>(where));
    }
  }
}

}  // namespace flashinfer::host
