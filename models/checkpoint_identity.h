// Tells whether two hosts have the same checkpoint without reading all of its weights.
#pragma once

#include <string>
#include <vector>

namespace trireme {

// "name bytes hash" of each file of the folder that a model is made of, by name: of a safetensors
// file the header is hashed (names, types, shapes, places) and eight pages of the weights, of the
// others (config.json, tokenizer) the whole. A file that cannot be read has no hash. One entry "-"
// when the folder holds none. Takes as long as reading a few megabytes.
std::vector<std::string> CheckpointIdentity(const std::string& model_dir);

}  // namespace trireme
