// The shape of a convolution's node, from its attributes (convolution.cpp has the list).
#pragma once

#include "kernels/convolution.h"
#include "layers/node.h"

namespace infl {

struct ConvolutionShape {
  explicit ConvolutionShape(const Node& node) : transposed(node.attribute("transposed") != 0), out_channels(node.attribute("out_channels")) {
    const int64_t in_channels = node.attribute("in_channels");
    conv.groups = node.attribute("groups");
    conv.x_channels = transposed ? out_channels : in_channels;
    conv.y_channels = transposed ? in_channels : out_channels;
    const auto &in = node.list("input"), &out = node.list("output");
    for (int a = 0; a < 3; ++a) {
      conv.x_size[a] = transposed ? out[a] : in[a];
      conv.y_size[a] = transposed ? in[a] : out[a];
      conv.kernel[a] = node.list("kernel")[a];
      conv.stride[a] = node.list("stride")[a];
      conv.dilation[a] = node.list("dilation")[a];
      conv.padding[a] = node.list("padding")[a];
    }
    out_plane = transposed ? conv.x_plane() : conv.y_plane();
    images = node.width / (out_channels * out_plane);
  }
  // The convolution of the output with a single tap, whose columns are the channels of each position.
  Convolution pixels() const {
    Convolution c;
    c.x_channels = c.y_channels = out_channels;
    for (int a = 0; a < 3; ++a) c.x_size[a] = c.y_size[a] = transposed ? conv.x_size[a] : conv.y_size[a];
    return c;
  }
  // Whether gradients that are multiplied are best left as outer products, their matrix products being larger than what is lost by forming them
  // again; where the sums take Winograd's algorithm or run along many positions, they are cheaper.
  bool multiplies_outer_products() const {
    constexpr int64_t kMostPositions = 64;
    return conv.groups == 1 && !transposed && positions() <= std::min(kMostPositions, conv.y_channels) && !takes_winograd(conv);
  }
  int64_t positions() const { return images * conv.y_plane(); }
  // Elements of one example's factor of the kernel for products.
  int64_t factor_size() const {
    return multiplies_outer_products() ? positions() * (conv.x_channels * conv.taps() + out_channels) : conv.weight_size();
  }
  // For values: their rounding errors move kinks of later activations, those of products only themselves.
  Convolution direct() const {
    Convolution c = conv;
    c.direct = true;
    return c;
  }
  Convolution conv;
  bool transposed;
  int64_t out_channels, out_plane;
  int64_t images;  // of one example
};

// Of one prepared image (convolution_prepare), worked out once for a node.
template <class T>
int64_t convolution_prepared_size(const Node& node, const ConvolutionShape& s) {
  const Context host{};
  return *node.derived_on(host, "prepared size", [&] {
    int64_t size = 0;
    convolution_prepared_size_stub<T>(host, s.conv, &size);
    return std::vector<int64_t>{size};
  });
}

}  // namespace infl
