#include "tests/fuzz/parser_checks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "models/checkpoint_maker.h"
#include "models/config.h"
#include "models/memory_plan.h"
#include "models/safetensors.h"

namespace trireme {
namespace {

// An error must be one line that begins with the name of the file.
void CheckMessage(const absl::Status& status, const std::string& name) {
  const std::string message(status.message());
  CHECK(message.starts_with(name)) << message;
  CHECK(message.find('\n') == std::string::npos) << message;
  CHECK(message.size() < 2000) << message;
}

}  // namespace

bool CheckSafetensorsImage(const std::string& image, int64_t file_bytes) {
  const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  CHECK(fd >= 0 && write(fd, image.data(), image.size()) == static_cast<ssize_t>(image.size()));
  file_bytes = std::max(file_bytes, static_cast<int64_t>(image.size()));
  CHECK_EQ(ftruncate(fd, file_bytes), 0);
  const std::string path = absl::StrCat("/proc/self/fd/", fd);
  const auto file = SafetensorsFile::Open(path);
  close(fd);
  if (!file.ok()) {
    CheckMessage(file.status(), path);
    return false;
  }
  int64_t data_bytes = 0, first = file_bytes;
  for (const auto& [name, entry] : (*file)->header().tensors) {
    CHECK(entry.begin >= 8 && entry.begin <= entry.end && entry.end <= file_bytes) << name;
    if (entry.foreign_dtype.empty()) {
      int64_t bytes = static_cast<int64_t>(SizeOf(entry.dtype));
      for (const int64_t dim : entry.dims)
        CHECK(dim >= 0 && !__builtin_mul_overflow(bytes, dim, &bytes)) << name;
      CHECK_EQ(bytes, entry.end - entry.begin) << name;
    }
    data_bytes += entry.end - entry.begin;
    first = std::min(first, entry.begin);
    char last = 0;
    CHECK(entry.end == entry.begin || (*file)->Read(entry.end - 1, 1, &last).ok()) << name;
  }
  CHECK_EQ(first + data_bytes, file_bytes) << "tensors must cover the data exactly once";
  return true;
}

bool CheckConfigJson(const std::string& json) {
  const auto config = ParseModelConfig(json, "config.json");
  if (!config.ok()) {
    CheckMessage(config.status(), "config.json");
    return false;
  }
  CHECK(config->num_heads >= 1 && config->num_kv_heads >= 1 &&
        config->num_heads % config->num_kv_heads == 0);
  CHECK(config->head_dim >= 2 && config->head_dim % 2 == 0 && config->num_layers >= 1);
  CHECK_GE(config->SlidingWindow(0), 0);
  const int64_t parameters = TotalParameters(*config);
  CHECK(parameters > 0 && parameters < INT64_MAX / 4) << parameters;
  const std::vector<double> frequencies = RopeFrequencies(*config);
  CHECK_EQ(static_cast<int64_t>(frequencies.size()), config->head_dim / 2);
  for (const double frequency : frequencies)
    CHECK(std::isfinite(frequency) && frequency > 0) << frequency;
  const auto again = ParseModelConfig(ConfigJson(*config), "again");
  CHECK(again.ok()) << again.status().ToString();
  CHECK_EQ(TotalParameters(*again), parameters);
  return true;
}

}  // namespace trireme
