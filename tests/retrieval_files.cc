#include "tests/retrieval_files.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/check.h"
#include "models/mol_checkpoint.h"
#include "tests/testing.h"

namespace trireme {
namespace {

template <typename T>
std::string Bytes(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

}  // namespace

void TestItems::Append(int64_t id, const std::vector<float>& embedding, uint64_t attribute) {
  ids.push_back(id);
  embeddings.insert(embeddings.end(), embedding.begin(), embedding.end());
  if (!attribute_names.empty()) attributes.push_back(attribute);
}

TestItems RandomItems(int64_t count, int64_t dim, uint64_t seed, bool attributes) {
  TestItems items;
  items.dim = dim;
  if (attributes) items.attribute_names = {"a", "b", "c", "d"};
  for (int64_t i = 0; i < count; ++i) {
    std::vector<float> row(dim);
    for (int64_t k = 0; k < dim; ++k) {
      row[k] = static_cast<float>(RandomValue(seed, i * dim + k));
    }
    const auto word = static_cast<uint64_t>((RandomValue(seed + 1, i) + 1) * 8);
    items.Append(1000 + (i * 7919 + 13) % (count + 1000003), row, word);
  }
  return items;
}

void WriteTensors(const std::map<std::string, TestTensor>& tensors,
                  const std::map<std::string, std::string>& metadata, const std::string& path) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.dims},
                    {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), sizeof(length));
  out << text;
  for (const auto& [name, tensor] : tensors) out << tensor.bytes;
  CHECK(out.flush()) << path;
}

void WriteItems(const TestItems& items, const std::string& path) {
  std::map<std::string, TestTensor> tensors;
  std::map<std::string, std::string> metadata;
  tensors["item_embeddings"] = {"F32", {items.count(), items.dim}, Bytes(items.embeddings)};
  tensors["item_ids"] = {"I64", {items.count()}, Bytes(items.ids)};
  if (!items.attribute_names.empty()) {
    tensors["item_attributes"] = {"I64", {items.count(), 1}, Bytes(items.attributes)};
    std::string names;
    for (const std::string& name : items.attribute_names)
      names += (names.empty() ? "" : ",") + name;
    metadata["attributes"] = names;
  }
  WriteTensors(tensors, metadata, path);
}

MolConfig SmallHead() {
  MolConfig config;
  config.query_dim = 12;
  config.item_dim = 10;
  config.query_components = 4;
  config.item_components = 3;
  config.component_dim = 8;
  config.query_hidden = 16;
  config.uid_hash_sizes = {7};
  config.temperature = 0.05;
  config.gating_query_hidden = config.gating_item_hidden = config.gating_qi_hidden = 16;
  return config;
}

void WriteRandomHead(const MolConfig& config, const std::string& dir, uint64_t seed) {
  const absl::Status status = MakeMolCheckpoint(config, dir, seed);
  CHECK(status.ok()) << status.ToString();
}

}  // namespace trireme
