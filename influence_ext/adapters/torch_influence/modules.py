"""The three ways of torch-influence to multiply with the inverse of the damped Hessian."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import data

from influence_ext.adapters.torch_influence.base import BaseInfluenceModule, BaseObjective
from influence_ext.adapters.torch_influence.curvature import Curvature, DampedRisk, curvature_of
from influence_ext.errors import ArgumentError, ShapeError
from influence_ext.solvers import CG

_log = logging.getLogger("influence_ext")


class AutogradInfluenceModule(BaseInfluenceModule):
    """Forms the damped Hessian of the training loss and inverts it.

    Args:
        model, objective, train_loader, test_loader, device: see :class:`BaseInfluenceModule`.
        damp: λ, added to the diagonal.
        check_eigvals: refuse a damped Hessian with a negative eigenvalue.

    Attributes:
        inverse_hess: ``[P, P]``, of the parameters as they were at construction.

    Raises:
        ValueError: ``check_eigvals`` and an eigenvalue is negative.
        torch.linalg.LinAlgError: the damped Hessian is singular.

    Cost: P products with the Hessian and an inversion, ``O(P³)``.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader,
        test_loader: data.DataLoader,
        device: torch.device,
        damp: float,
        check_eigvals: bool = False,
    ):
        super().__init__(model=model, objective=objective, train_loader=train_loader, test_loader=test_loader, device=device)
        self.damp = damp
        hessian = DampedRisk(self, curvature_of(self, gnh=False).full(), damp).to_dense()
        if check_eigvals:
            eigenvalues = torch.linalg.eigvalsh(hessian)
            low, high = eigenvalues[0].item(), eigenvalues[-1].item()
            _log.info("torch_influence: the damped Hessian has eigenvalues from %g to %g", low, high)
            if not low >= 0:
                raise ArgumentError(
                    f"AutogradInfluenceModule: expected a damped Hessian without negative eigenvalues, got {low:.3g} with damp = "
                    f"{damp:g}; raise damp, or train closer to a minimum."
                )
        self.inverse_hess = torch.inverse(hessian)

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """``[P] -> [P]``, or ``[V, P] -> [V, P]``."""
        return (self.inverse_hess @ vec.T).T if vec.dim() == 2 else self.inverse_hess @ vec


class _ProductModule(BaseInfluenceModule):
    """What the iterative modules share."""

    gnh: bool
    damp: float

    def _on_curvature(self, method: Callable[[Curvature, Tensor], Tensor], vec: Tensor) -> Tensor:
        """``method`` with vectors as rows ``[V, P]``."""
        vectors = vec.detach().to(self.device)
        P = sum(shape.numel() for shape in self.params_shape)
        if vectors.dim() not in (1, 2) or vectors.shape[-1] != P:
            raise ShapeError(f"{type(self).__name__}: expected vec of shape [P] or [V, P] with P = {P}, got {list(vec.shape)}.")
        found = method(curvature_of(self, self.gnh), vectors.reshape(-1, P).contiguous())
        return found[0] if vec.dim() == 1 else found


class CGInfluenceModule(_ProductModule):
    """Conjugate gradients, as ``scipy.sparse.linalg.cg`` runs them.

    Args:
        model, objective, train_loader, test_loader, device: see :class:`BaseInfluenceModule`.
        damp: λ, added to the diagonal.
        gnh: the Gauss-Newton matrix of ``train_loss_on_outputs`` at ``train_outputs``, plus the regulariser's Hessian, instead of the
            Hessian.
        **kwargs: of ``scipy.sparse.linalg.cg``, such as ``rtol``, ``atol``, ``maxiter``; ``tol`` counts as ``rtol`` where SciPy has no
            ``tol`` any more.

    Raises:
        ImportError: SciPy is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader,
        test_loader: data.DataLoader,
        device: torch.device,
        damp: float,
        gnh: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model=model, objective=objective, train_loader=train_loader, test_loader=test_loader, device=device)
        _scipy_cg()  # missing, it is missed now
        self.damp, self.gnh, self.cg_kwargs = damp, gnh, kwargs

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """``[P] -> [P]``; or ``[V, P] -> [V, P]``, several vectors in one run of this library's CG to the same tolerance.

        Raises:
            TypeError: a keyword that ``scipy.sparse.linalg.cg`` does not have; ``vec`` of another dtype than the parameters.
            ShapeError: ``vec`` of another shape.

        Where CG stops short of its tolerance, the log says so.
        """
        return self._on_curvature(self._solve, vec)

    def _solve(self, curvature: Curvature, vectors: Tensor) -> Tensor:
        operator = DampedRisk(self, curvature.full(), self.damp)
        options = _scipy_options(self.cg_kwargs)
        if len(vectors) == 1 or not _translates(options, vectors):
            return torch.stack([self._scipy(operator, v, options) for v in vectors])
        rtol, steps = options.get("rtol", 1e-5), options.get("maxiter") or 10 * operator.num_parameters
        solution = CG(rtol=rtol, max_steps=steps, on_failure="return").solve(operator, vectors)
        # SciPy goes on where our CG stops, for instance at a negative eigenvalue; a vector gets what it would get alone.
        rows = [
            x if status.success else self._scipy(operator, v, options)
            for x, v, status in zip(solution.value, vectors, solution.status, strict=True)
        ]
        return torch.stack(rows)

    def _scipy(self, operator: DampedRisk, vec: Tensor, options: dict[str, Any]) -> Tensor:
        operator._check(vec, "[P]", vec.dim() == 1)
        found, info = _scipy_cg()(operator.to_scipy(), vec.cpu().numpy(), **options)
        if info != 0:
            _log.warning(
                "CGInfluenceModule: CG stopped after %s iterations short of its tolerance; raise maxiter or damp, or loosen rtol.", info
            )
        return torch.tensor(found, device=self.device)


class LiSSAInfluenceModule(_ProductModule):
    """The truncated Neumann series on random batches.

    ``h ← v + h − (H_B h + λ h)/σ``, T steps from ``h = v``, each on a batch B of the loader's size drawn with replacement; the result is
    the mean of ``h/σ`` over R repeats. The batches follow from torch's global generator, and for a seed are those that torch-influence
    draws.

    Args:
        model, objective, train_loader, test_loader, device: see :class:`BaseInfluenceModule`.
        damp: λ.
        repeat: R.
        depth: T.
        scale: σ, above half the top eigenvalue of every batch's damped Hessian.
        gnh: see :class:`CGInfluenceModule`.
        debug_callback: called with ``(r, t, h)`` after every step.

    Raises:
        ArgumentError (a ValueError): ``repeat`` or ``depth`` below 1, or ``scale`` not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader,
        test_loader: data.DataLoader,
        device: torch.device,
        damp: float,
        repeat: int,
        depth: int,
        scale: float,
        gnh: bool = False,
        debug_callback: Callable[[int, int, Tensor], None] | None = None,
    ):
        super().__init__(model=model, objective=objective, train_loader=train_loader, test_loader=test_loader, device=device)
        if repeat < 1 or depth < 1 or not scale > 0:
            raise ArgumentError(
                f"LiSSAInfluenceModule: expected repeat and depth of at least 1 and a positive scale, got {repeat}, {depth} and {scale:g}; "
                "correct them."
            )
        self.damp, self.gnh = damp, gnh
        self.repeat, self.depth, self.scale = repeat, depth, scale
        self.debug_callback = debug_callback

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """``[P] -> [P]``; or ``[V, P] -> [V, P]``, with the same batches for all vectors.

        A series that diverges comes back as it ended, and the log says so.

        Raises:
            ShapeError: ``vec`` of another shape.
        """
        return self._on_curvature(lambda curvature, vectors: self._series(curvature, vectors, vec.shape), vec)

    def _series(self, curvature: Curvature, vectors: Tensor, shape: torch.Size) -> Tensor:
        total = torch.zeros_like(vectors)
        for r in range(self.repeat):
            h = vectors.clone()
            for t, product in enumerate(curvature.sampled(self.depth)):
                h = (vectors + h).sub_(product(h).add_(h, alpha=self.damp), alpha=1 / self.scale)
                if self.debug_callback is not None:
                    self.debug_callback(r, t, h.view(shape))
            total += h / self.scale
        # the norm of a series that settles is at most (T + 1)‖v‖
        if not bool((torch.linalg.vector_norm(total * self.scale, dim=1) <= self.repeat * self._bound(vectors)).all()):
            _log.warning("LiSSAInfluenceModule: the series diverged with scale = %g; raise scale above the top eigenvalue.", self.scale)
        return total / self.repeat

    def _bound(self, vectors: Tensor) -> Tensor:
        return 2 * (self.depth + 1) * torch.linalg.vector_norm(vectors, dim=1)


def _scipy_cg() -> Callable[..., Any]:
    try:
        from scipy.sparse.linalg import cg
    except ImportError as reason:
        raise ImportError(f"CGInfluenceModule: expected the package scipy for its cg, got {reason}; run pip install scipy.") from reason
    found: Callable[..., Any] = cg
    return found


def _scipy_options(options: dict[str, Any]) -> dict[str, Any]:
    """With the tolerance under the name that this SciPy has for it."""
    known = inspect.signature(_scipy_cg()).parameters
    renamed = {"tol": "rtol"} if "tol" not in known else {"rtol": "tol"} if "rtol" not in known else {}
    return {renamed.get(name, name): value for name, value in options.items()}


def _translates(options: dict[str, Any], vectors: Tensor) -> bool:
    """Whether the library's CG takes these options for every vector with the same meaning."""
    if not options.keys() <= {"rtol", "atol", "maxiter"} or not 0 < options.get("rtol", 1e-5) < 1:
        return False
    smallest = torch.linalg.vector_norm(vectors, dim=1).min().item()
    return bool((options.get("atol") or 0.0) <= options.get("rtol", 1e-5) * smallest)
