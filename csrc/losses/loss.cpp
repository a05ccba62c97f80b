#include "losses/loss.h"

#include <map>

namespace infl {

namespace {

template <class T>
std::map<std::string, std::unique_ptr<Loss<T>>>& registry() {
  static std::map<std::string, std::unique_ptr<Loss<T>>> losses;
  return losses;
}

}  // namespace

template <class T>
const Loss<T>* find_loss(const std::string& name) {
  const auto it = registry<T>().find(name);
  return it == registry<T>().end() ? nullptr : it->second.get();
}

template <class T>
void register_loss(const std::string& name, std::unique_ptr<Loss<T>> loss) {
  registry<T>()[name] = std::move(loss);
}

std::vector<std::string> loss_names() {
  std::vector<std::string> names;
  for (const auto& [name, loss] : registry<float>()) names.push_back(name);
  return names;
}

template const Loss<float>* find_loss<float>(const std::string&);
template const Loss<double>* find_loss<double>(const std::string&);
template void register_loss<float>(const std::string&, std::unique_ptr<Loss<float>>);
template void register_loss<double>(const std::string&, std::unique_ptr<Loss<double>>);

}  // namespace infl
