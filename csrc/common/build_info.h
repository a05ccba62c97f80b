// What this binary was built with and what it found on this machine.
#pragma once

#include <map>
#include <string>

namespace infl {

std::map<std::string, std::string> build_info();

}  // namespace infl
