#include "tests/launch/recorded.h"

#include <gtest/gtest.h>

#include <fstream>

#include "nlohmann/json.hpp"

namespace trireme {

Environment Recorded(const std::string& name, const std::string& patch) {
  std::ifstream in(std::string(TRIREME_SOURCE_DIR "/tests/launch/environments/") + name + ".json");
  EXPECT_TRUE(in.is_open()) << name;
  nlohmann::json json = nlohmann::json::parse(in);
  json.merge_patch(nlohmann::json::parse(patch));
  absl::StatusOr<Environment> environment = EnvironmentFromJson(json.dump());
  EXPECT_TRUE(environment.ok()) << environment.status();
  return environment.value_or(Environment{});
}

}  // namespace trireme
