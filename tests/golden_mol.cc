#include "tests/golden_mol.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "models/safetensors.h"

namespace trireme {
namespace {

using Metadata = std::map<std::string, std::string>;

int64_t Number(const Metadata& metadata, const std::string& key, int64_t otherwise = 0) {
  const auto it = metadata.find(key);
  return it == metadata.end() ? otherwise : std::stoll(it->second);
}

MolConfig ConfigOf(const Metadata& m) {
  MolConfig config;
  if (m.count("gating") > 0) {  // the notebook's variant
    config.query_dim = config.item_dim = Number(m, "D");
    config.query_components = config.item_components = Number(m, "C");
    config.component_dim = Number(m, "component_dim");
    config.eps = 1e-12;
    config.pairing = MolPairing::kDiagonal;
    config.gating = MolGating::kConcatRelu;
    config.gating_hidden = Number(m, "gating_hidden");
    return config;
  }
  config.query_dim = Number(m, "D_q");
  config.item_dim = Number(m, "D_x");
  config.query_components = Number(m, "P_q");
  config.item_components = Number(m, "P_x");
  config.component_dim = Number(m, "d");
  config.query_hidden = std::max<int64_t>(0, Number(m, "query_hidden"));
  config.item_hidden = std::max<int64_t>(0, Number(m, "item_hidden"));
  config.query_geglu = m.at("query_nonlinearity") == "geglu";
  config.item_geglu = m.at("item_nonlinearity") == "geglu";
  if (!m.at("uid_hash_sizes").empty()) config.uid_hash_sizes = {Number(m, "uid_hash_sizes")};
  config.l2_norm = m.at("l2_norm") == "1";
  config.eps = std::stod(m.at("eps"));
  config.temperature = std::stod(m.at("temperature"));
  config.gating_query_hidden = Number(m, "gating_query_hidden");
  config.gating_item_hidden = Number(m, "gating_item_hidden");
  config.gating_qi_hidden = Number(m, "gating_qi_hidden");
  return config;
}

template <typename T>
std::vector<T> ReadAll(const SafetensorsFile& file, const TensorEntry& entry) {
  std::vector<T> values((entry.end - entry.begin) / sizeof(T));
  EXPECT_TRUE(file.Read(entry.begin, entry.end - entry.begin, values.data()).ok());
  return values;
}

}  // namespace

std::vector<std::string> GoldenMolNames() {
  return {"tiny_2x2x8", "rails_8x4x64", "notebook_concat_c4"};
}

GoldenMol ReadGoldenMol(const std::string& name) {
  const std::string path =
      std::string(TRIREME_SOURCE_DIR) + "/tests/golden/mol/" + name + ".safetensors";
  const auto file = SafetensorsFile::Open(path).value();
  const Metadata& metadata = file->header().metadata;
  GoldenMol golden;
  golden.name = name;
  golden.config = ConfigOf(metadata);
  golden.batch = Number(metadata, "B");
  golden.items = Number(metadata, "N");
  golden.k = Number(metadata, "k");
  golden.average_k = Number(metadata, "avg_k");
  golden.each_k = Number(metadata, "per_embd_k");
  for (const auto& [key, entry] : file->header().tensors) {
    if (entry.foreign_dtype == "F64") {
      golden.tensors[key] = {entry.dims, ReadAll<double>(*file, entry)};
    } else if (entry.dtype == DType::kF32) {
      const std::vector<float> values = ReadAll<float>(*file, entry);
      golden.tensors[key] = {entry.dims, {values.begin(), values.end()}};
    } else {
      golden.integers[key] = ReadAll<int64_t>(*file, entry);
    }
  }
  return golden;
}

std::vector<float> GoldenMol::floats(const std::string& name) const {
  return {values(name).begin(), values(name).end()};
}

reference::MolCase GoldenMol::Case() const {
  reference::MolCase mol;
  mol.query_components = config.query_components;
  mol.item_components = config.item_components;
  mol.component_dim = config.component_dim;
  mol.diagonal = config.pairing == MolPairing::kDiagonal;
  mol.concat_relu = config.gating == MolGating::kConcatRelu;
  mol.query_gelu = config.query_geglu;
  mol.item_gelu = config.item_geglu;
  mol.l2_norm = config.l2_norm;
  mol.eps = config.eps;
  mol.temperature = config.temperature;
  mol.uid_hash_sizes = config.uid_hash_sizes;
  for (const auto& [key, tensor] : tensors) {
    if (key.rfind("model.", 0) == 0) mol.weights[key.substr(6)] = tensor;
  }
  return mol;
}

void GoldenMol::WriteModel(const std::string& dir, const std::string& prefix) const {
  std::filesystem::create_directories(dir);
  std::ofstream(dir + "/config.json") << MolConfigJson(config);
  std::vector<SafetensorsWriter::Declared> declared;
  const reference::MolCase mol = Case();
  for (const auto& [key, tensor] : mol.weights) {
    declared.push_back({prefix + key, DType::kF32, tensor.dims});
  }
  const auto writer = SafetensorsWriter::Create(dir + "/model.safetensors", declared).value();
  for (const auto& [key, tensor] : mol.weights) {
    const std::vector<float> values(tensor.values.begin(), tensor.values.end());
    ASSERT_TRUE(writer->Append(values.data(), static_cast<int64_t>(values.size() * 4)).ok());
  }
  ASSERT_TRUE(writer->Finish().ok());
}

}  // namespace trireme
