// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/json.hpp"

/// The dimensions of a model as a JSON file, keys named as in ModelConfig:
///   {"vocab": 4096, "hidden": 512, "ffn_hidden": 768, "n_head": 8, "n_layer": 12, "window": 512,
///    "sliding": {"head_dim": 64, "n_head_kv": 4}, "full": {"head_dim": 256, "n_head_kv": 1}}
/// Optional: "context" (131072), "rms_epsilon" (1e-6), "softcap" (30), in sliding and full "rope_theta" (1e4 and 1e6)
/// and "rope_pairs" (head_dim / 2 and head_dim / 8); "is_sliding" [1, 1, 0, ...] in place of "n_layer", whose layers
/// are five sliding, one full, and so on. A key that is not listed here is refused.
namespace gemma4 {

namespace detail {

/// One JSON object whose keys are read by name; what was not asked for is refused at the end.
class JsonFields {
 public:
  JsonFields(const JsonValue& value, std::string where) : where_(std::move(where)), object_(value.object()) {
    require_format(object_ != nullptr, where_, ": expected an object, found ", value.kind());
  }

  [[nodiscard]] const JsonValue* find(std::string_view key) {
    known_.emplace(key);
    const auto found = object_->find(key);
    return found == object_->end() ? nullptr : &found->second;
  }
  [[nodiscard]] const JsonValue& get(std::string_view key) {
    const JsonValue* const value = find(key);
    require_format(value != nullptr, where_, ": key '", key, "' is missing");
    return *value;
  }

  [[nodiscard]] double number(std::string_view key) {
    const JsonValue& value = get(key);
    require_format(value.number() != nullptr, where_, ": key '", key, "' is ", value.kind(), ", expected a number");
    return *value.number();
  }
  [[nodiscard]] double number_or(std::string_view key, double fallback) {
    return find(key) == nullptr ? fallback : number(key);
  }

  [[nodiscard]] std::int64_t integer(std::string_view key) {
    constexpr double kLargest = 1e12;  // far above any dimension, far below where doubles skip integers
    const double value = number(key);
    require_format(value == std::floor(value) && std::abs(value) <= kLargest, where_, ": key '", key, "' is ", value,
                   ", expected a whole number");
    return static_cast<std::int64_t>(value);
  }
  [[nodiscard]] std::int64_t integer_or(std::string_view key, std::int64_t fallback) {
    return find(key) == nullptr ? fallback : integer(key);
  }

  void refuse_strangers() const {
    for (const auto& [key, value] : *object_) {
      require_format(known_.contains(key), where_, ": key '", key, "' is not known");
    }
  }

 private:
  std::string where_;
  const JsonValue::Object* object_;
  std::set<std::string, std::less<>> known_;
};

[[nodiscard]] inline AttentionConfig attention_from_json(const JsonValue& value, const std::string& where,
                                                         double rope_theta, std::int64_t rope_divisor) {
  JsonFields fields(value, where);
  AttentionConfig attention;
  attention.head_dim = fields.integer("head_dim");
  attention.n_head_kv = fields.integer("n_head_kv");
  attention.rope_theta = fields.number_or("rope_theta", rope_theta);
  attention.rope_pairs = fields.integer_or("rope_pairs", attention.head_dim / rope_divisor);
  fields.refuse_strangers();
  return attention;
}

[[nodiscard]] inline std::vector<std::uint8_t> pattern_from_json(JsonFields& fields, const std::string& source) {
  constexpr std::int64_t kMaxLayers = 4096;
  const JsonValue* const pattern = fields.find("is_sliding");
  require_format((pattern == nullptr) != (fields.find("n_layer") == nullptr), source,
                 ": expected one of the keys 'n_layer' and 'is_sliding'");
  if (pattern == nullptr) {
    const std::int64_t n_layer = fields.integer("n_layer");
    require_format(n_layer >= 1 && n_layer <= kMaxLayers, source, ": key 'n_layer' is ", n_layer, ", expected 1 to ",
                   kMaxLayers);
    return five_to_one_pattern(n_layer);
  }
  require_format(pattern->array() != nullptr, source, ": key 'is_sliding' is ", pattern->kind(), ", expected an array");
  std::vector<std::uint8_t> flags;
  for (const JsonValue& item : *pattern->array()) {
    const double* const number = item.number();
    require_format(number != nullptr && (*number == 0 || *number == 1), source, ": key 'is_sliding' at index ",
                   flags.size(), ": expected 0 or 1");
    flags.push_back(*number != 0);
  }
  return flags;
}

}  // namespace detail

/// @param source the file's name, for messages
/// @throws FormatError naming the key, what was found and what was expected
/// @throws std::invalid_argument for a config that no backend can run
[[nodiscard]] inline ModelConfig config_from_json(std::string_view text, const std::string& source) {
  const JsonValue value = parse_json(text, source);
  detail::JsonFields fields(value, source);
  ModelConfig config;
  config.vocab = fields.integer("vocab");
  config.hidden = fields.integer("hidden");
  config.ffn_hidden = fields.integer("ffn_hidden");
  config.n_head = fields.integer("n_head");
  config.window = fields.integer("window");
  config.context = fields.integer_or("context", 131072);
  config.rms_epsilon = static_cast<float>(fields.number_or("rms_epsilon", 1e-6));
  config.softcap = static_cast<float>(fields.number_or("softcap", 30.0));
  config.sliding = detail::attention_from_json(fields.get("sliding"), source + ": sliding", 1e4, 2);
  config.full = detail::attention_from_json(fields.get("full"), source + ": full", 1e6, 8);
  config.is_sliding = detail::pattern_from_json(fields, source);
  fields.refuse_strangers();
  require_config(config);
  return config;
}

/// A shape by name (31b, 12b, nano, tiny) or, when the name ends in .json, from that file.
[[nodiscard]] inline ModelConfig config_from_name(const std::string& name) {
  if (name == "31b") return gemma4_31b();
  if (name == "12b") return gemma4_12b();
  if (name == "nano") return gemma4_nano();
  if (name == "tiny") return gemma4_tiny();
  require(name.ends_with(".json"), "model shape '", name,
          "': expected 31b, 12b, nano, tiny or a .json file of dimensions");
  std::ifstream file(name, std::ios::binary);
  require(file.good(), "model shape: cannot read ", name);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return config_from_json(text, name);
}

}  // namespace gemma4
