// The windows of a pool's node, from its attributes (pooling.cpp has the list).
#pragma once

#include <string>

#include "kernels/pooling.h"
#include "layers/node.h"

namespace infl {

inline Windows pooling_windows(const Context& ctx, const Node& node, bool counted) {
  Windows w{};
  for (int a = 0; a < 3; ++a) {
    const std::string axis = std::to_string(a);
    w.in[a] = node.list("input")[a];
    w.dilation[a] = node.list("dilation")[a];
    w.out[a] = static_cast<int64_t>(node.list("begin_" + axis).size());
    w.begin[a] = node.list_on(ctx, "begin_" + axis);
    w.end[a] = node.list_on(ctx, "end_" + axis);
    w.count[a] = counted ? node.list_on(ctx, "count_" + axis) : nullptr;
  }
  return w;
}

}  // namespace infl
