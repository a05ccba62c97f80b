// Scalars of one right-hand side of conjugate gradients, and what is decided from them: the same on the host and on a device.
//
//   p ← z + β p,  β = rᵀz / (rᵀz of before),  z = M⁻¹r        α = rᵀz / pᵀA p        x += α p,  r −= α A p
#pragma once

#include <cmath>

#include "common/macros.h"

namespace infl {

enum class CgStatus : int { running = 0, converged = 1, max_steps = 2, stalled = 3, breakdown = 4, non_finite = 5, not_psd = 6 };

// A row of the [V, kCgScalars] table of doubles that Python holds.
struct CgColumn {
  double status;     // CgStatus
  double steps;      // taken so far
  double budget;     // steps it may take
  double target;     // of ‖r‖
  double rr;         // ‖r‖²
  double rz;         // rᵀz of the step before
  double rz_next;    // rᵀz of this step
  double curvature;  // pᵀA p
  double squares;    // ‖p‖²
  double top;        // ‖A‖ as far as seen: the largest curvature / squares

  INFL_HD bool is_running() const { return status == static_cast<double>(CgStatus::running); }
};

inline constexpr int kCgScalars = sizeof(CgColumn) / sizeof(double);

// ε of the data type, and what no eigenvalue of A is below by its construction; 0: nothing is known.
struct CgLimits {
  double eps, lower;
};

INFL_HD double cg_beta(const CgColumn& c, double rz_next) { return c.steps == 0 ? 0.0 : rz_next / c.rz; }

// NaN goes on to the caller, as in torch.maximum.
INFL_HD double cg_top(const CgColumn& c, double curvature, double squares) {
  const double quotient = curvature / squares;
  return c.top >= quotient ? c.top : quotient;
}

// Curvature along p that is no longer believed.
INFL_HD double cg_floor(const CgLimits& limits, double top, double squares) {
  return limits.lower > 0 ? 0.5 * limits.lower * squares : limits.eps * top * squares;
}

// 0 where the direction cannot be used, also where a comparison meets NaN: such a column keeps the x it had.
INFL_HD double cg_alpha(const CgColumn& c, const CgLimits& limits, double curvature, double squares) {
  return curvature > cg_floor(limits, cg_top(c, curvature, squares), squares) ? c.rz_next / curvature : 0.0;
}

// Ends the step of a running column whose residual is now of ‖r‖² = rr: counts it, and says whether the column goes on.
INFL_HD void cg_judge(CgColumn& c, const CgLimits& limits, double rr) {
  c.top = cg_top(c, c.curvature, c.squares);
  c.rr = rr;
  c.rz = c.rz_next;
  c.steps += 1;
  const double floor = cg_floor(limits, c.top, c.squares), r_norm = std::sqrt(rr);
  const bool is_finite = std::fabs(r_norm) <= 1.7976931348623157e308 && std::fabs(c.curvature) <= 1.7976931348623157e308;
  // where A is definite by construction, only a curvature far below what rounding does proves the opposite
  const double certain = limits.lower > 0 ? -1000 * limits.eps * c.top * c.squares : floor;
  CgStatus status = CgStatus::running;
  if (!is_finite) {
    status = CgStatus::non_finite;
  } else if (c.rz_next <= 0) {
    status = CgStatus::breakdown;
  } else if (c.curvature <= floor) {
    status = c.curvature <= certain ? CgStatus::not_psd : CgStatus::stalled;
  } else if (r_norm <= c.target) {
    status = CgStatus::converged;
  } else if (c.steps == c.budget) {
    status = CgStatus::max_steps;
  }
  c.status = static_cast<double>(status);
}

}  // namespace infl
