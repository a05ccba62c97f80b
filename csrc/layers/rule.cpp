#include "layers/rule.h"

#include <map>

namespace infl {

namespace {

template <class T>
std::map<std::string, std::unique_ptr<Rule<T>>>& registry() {
  static std::map<std::string, std::unique_ptr<Rule<T>>> rules;
  return rules;
}

}  // namespace

template <class T>
const Rule<T>* find_rule(const std::string& name) {
  const auto it = registry<T>().find(name);
  return it == registry<T>().end() ? nullptr : it->second.get();
}

template <class T>
void register_rule(const std::string& name, std::unique_ptr<Rule<T>> rule) {
  registry<T>()[name] = std::move(rule);
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const auto& [name, rule] : registry<float>()) names.push_back(name);
  return names;
}

template const Rule<float>* find_rule<float>(const std::string&);
template const Rule<double>* find_rule<double>(const std::string&);
template void register_rule<float>(const std::string&, std::unique_ptr<Rule<float>>);
template void register_rule<double>(const std::string&, std::unique_ptr<Rule<double>>);

}  // namespace infl
