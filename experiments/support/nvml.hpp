// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <string>

#include "gemma4/report/run_info.hpp"

/// What only the driver's management library says of a card. It is opened at run time, so that programs start where it
/// is missing; what it does not say stays empty.
namespace gemma4::experiment {

struct DriverSays {
  std::string release;        ///< of the driver, as 580.95.05
  std::string power_limit_w;  ///< watts that the card is held to, whole
};

namespace detail {

struct NvmlDevice;  // opaque

/// The functions of libnvidia-ml.so.1 that are used, by their documented names and types; each returns 0 when it went
/// well. A function that is missing is null.
class Nvml {
 public:
  Nvml() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) return;
    find(init_, "nvmlInit_v2");
    find(shutdown_, "nvmlShutdown");
    find(driver_version_, "nvmlSystemGetDriverVersion");
    find(device_at_, "nvmlDeviceGetHandleByPciBusId_v2");
    find(power_limit_, "nvmlDeviceGetEnforcedPowerLimit");
    is_ready_ = init_ != nullptr && shutdown_ != nullptr && init_() == 0;
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  ~Nvml() {
    if (is_ready_) shutdown_();
    if (library_ != nullptr) dlclose(library_);
  }

  [[nodiscard]] std::string driver_release() const {
    char text[96] = {};
    const bool is_known = is_ready_ && driver_version_ != nullptr && driver_version_(text, sizeof(text) - 1) == 0;
    return is_known ? text : "";
  }

  /// @param pci_bus_id as cudaDeviceGetPCIBusId() writes it
  [[nodiscard]] std::string power_limit_w(const char* pci_bus_id) const {
    NvmlDevice* device = nullptr;
    unsigned int milliwatt = 0;
    const bool is_known = is_ready_ && device_at_ != nullptr && power_limit_ != nullptr &&
                          device_at_(pci_bus_id, &device) == 0 && power_limit_(device, &milliwatt) == 0;
    return is_known ? std::to_string((milliwatt + 500) / 1000) : "";
  }

 private:
  template <class TFunction>
  void find(TFunction*& function, const char* name) {
    function = reinterpret_cast<TFunction*>(dlsym(library_, name));
  }

  void* library_ = nullptr;
  bool is_ready_ = false;
  int (*init_)() = nullptr;
  int (*shutdown_)() = nullptr;
  int (*driver_version_)(char*, unsigned int) = nullptr;
  int (*device_at_)(const char*, NvmlDevice**) = nullptr;
  int (*power_limit_)(NvmlDevice*, unsigned int*) = nullptr;
};

}  // namespace detail

/// Of the driver and of the card at this address of the bus.
[[nodiscard]] inline DriverSays ask_driver(const char* pci_bus_id) {
  const detail::Nvml nvml;
  DriverSays says{.release = nvml.driver_release(), .power_limit_w = nvml.power_limit_w(pci_bus_id)};
  if (says.release.empty()) {
    std::ifstream file("/proc/driver/nvidia/version");
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    says.release = driver_release_in(text);
  }
  return says;
}

}  // namespace gemma4::experiment
