// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "gemma4/config.hpp"
#include "gemma4/float16.hpp"

int main() {
  const gemma4::ModelConfig config = gemma4::gemma4_31b();
  std::printf("%lld layers, hidden %lld\n", static_cast<long long>(config.n_layer()),
              static_cast<long long>(config.hidden));
  return config.n_layer() == 60 && gemma4::to_float(gemma4::to_bf16(1.5f)) == 1.5f ? 0 : 1;
}
