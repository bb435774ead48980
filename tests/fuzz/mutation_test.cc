// Mutated checkpoints' headers and configs: nothing may crash, hang or be accepted with numbers
// that do not fit together.
#include <cstring>

#include "tests/fuzz/fuzz_cases.h"
#include "tests/fuzz/parser_checks.h"

namespace trireme {
namespace {

// Length and header of a safetensors file, without its data.
std::string Head(const std::string& header) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header;
}

// Keeps the length in front right, as the interesting faults are behind it; every eighth case
// leaves it wrong.
std::string WithLengthRepaired(std::string image, uint64_t number) {
  if (number % 8 == 0 || image.size() < 8) return image;
  const uint64_t length = image.size() - 8;
  std::memcpy(image.data(), &length, sizeof(length));
  return image;
}

TEST(MutationTest, SafetensorsHeader) {
  const std::string golden = SourceFile("tests/golden/tiny-llama3/model.safetensors");
  uint64_t golden_header = 0;
  std::memcpy(&golden_header, golden.data(), sizeof(golden_header));
  const std::vector<std::string> seeds = {
      Head(
          R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}})"),
      Head(
          R"({"__metadata__":{"format":"pt"},"x":{"dtype":"F16","shape":[],"data_offsets":[0,2]},)"
          R"("y":{"dtype":"I64","shape":[0,7],"data_offsets":[2,2]},"z":{"dtype":"U8","shape":[3],"data_offsets":[2,5]}}   )"),
      Head(
          R"({"q":{"dtype":"F8_E4M3","shape":[16,2],"data_offsets":[4,36]},"s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})"),
      Head("{}"), golden.substr(0, 8 + golden_header)};
  const std::vector<int64_t> data_bytes = {32, 5, 36, 0,
                                           static_cast<int64_t>(golden.size() - 8 - golden_header)};
  const Mutator mutator(seeds, {"\"dtype\":",
                                "\"shape\":",
                                "\"data_offsets\":",
                                "\"__metadata__\":",
                                "{}",
                                "[]",
                                "[0,0]",
                                "null",
                                "true",
                                "\"F32\"",
                                "\"F64\"",
                                "\"I32\"",
                                "\"a\":",
                                "\"\\u0000\":",
                                "-",
                                "{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                "\"",
                                std::string(100, '['),
                                std::string(8, '\xff')});
  uint64_t number = 0;
  RunFuzzCases(mutator, kFuzzCases, [&](const std::string& input, size_t seed) {
    const std::string image = WithLengthRepaired(input, ++number);
    return CheckSafetensorsImage(image, static_cast<int64_t>(image.size()) + data_bytes[seed]);
  });
}

TEST(MutationTest, Config) {
  std::vector<std::string> seeds;
  for (const char* model :
       {"tiny-llama3", "tiny-qwen2", "tiny-qwen3", "tiny-mistral-swa", "tiny-starcoder2"}) {
    seeds.push_back(SourceFile(std::string("tests/golden/") + model + "/config.json"));
  }
  seeds.push_back(
      R"({"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":8,"num_hidden_layers":1,)"
      R"("num_attention_heads":4,"vocab_size":9,"max_position_embeddings":7,"dtype":"bfloat16","eos_token_id":[1,2],)"
      R"("rope_parameters":{"rope_type":"default","rope_theta":500000.0}})");
  const Mutator mutator(seeds, {"\"head_dim\": 16,",
                                "\"rope_scaling\": {\"rope_type\": \"yarn\"},",
                                "\"rope_parameters\": {},",
                                "\"layer_types\": [\"full_attention\"],",
                                "\"use_sliding_window\": true,",
                                "\"sliding_window\": 4,",
                                "\"quantization_config\": {},",
                                "\"attention_bias\": true,",
                                "\"mlp_bias\": true,",
                                "null",
                                "true",
                                "{}",
                                "[]",
                                "\"\"",
                                "{",
                                "}",
                                "[",
                                "]",
                                ",",
                                ":",
                                "\"",
                                "-",
                                std::string(100, '['),
                                "\"Qwen2ForCausalLM\"",
                                "\"MistralForCausalLM\""});
  RunFuzzCases(mutator, kFuzzCases,
               [](const std::string& input, size_t) { return CheckConfigJson(input); });
}

}  // namespace
}  // namespace trireme
