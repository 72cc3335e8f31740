"""A target that can be measured here: its profile, kernel store and tuner, and the one way a module's time is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autocomp.compiler.build import CompiledModel, build, time_in_turn
from autocomp.compiler.verify import check_outputs, first_differing_layer
from autocomp.devices.device import Compiled, latency_model, quieter
from autocomp.errors import MismatchError, UsageError
from autocomp.hardware.energy import Counters, Energy, energies
from autocomp.hardware.profile import Profile
from autocomp.records.latency import Latency
from autocomp.tuning.store import KernelStore
from autocomp.tuning.tune import Tuner

if TYPE_CHECKING:
    import torch


class LocalDevice:
    """Compiles, checks and times modules on this machine for one profile. UsageError if the profile is reached another way.

    ``counters`` tell what an inference draws, where the profile's power is by them too.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, profile: Profile, store: KernelStore | None = None, counters: Counters | None = None) -> None:
        if profile.reach != "local":
            raise UsageError(
                f"profile {profile.name!r} is reached by {profile.reach!r}, not on this machine (reach: local): open it with open_device"
            )
        self.profile, self.counters = profile, counters
        self.store = KernelStore.open(profile) if store is None else store  # an empty one is falsy
        self.tuner = Tuner(profile, self.store)
        self.model = latency_model(profile, self.tuner)

    def compile(self, model: torch.nn.Module, inputs: Sequence[tuple[torch.Tensor, ...]]) -> CompiledModel:
        """Build a module for the shapes of the first inputs and compare it with torch on all of them.

        MismatchError names the first layer that differs; ExportError as ``build``.
        """
        compiled = build(model, inputs[0], self.profile, self.tuner)
        check_compiled(model, compiled.run, inputs, lambda m: build(m, inputs[0], self.profile, self.tuner).run)
        return compiled

    def time(self, compiled: Compiled, example_inputs: tuple[torch.Tensor, ...]) -> Latency:
        """Measure a module; a noisy measurement is taken twice and the quieter one kept."""
        return quieter(lambda: [compiled.time(*example_inputs)])[0]

    def time_in_turn(self, modules: Sequence[Compiled], example_inputs: tuple[torch.Tensor, ...]) -> list[Latency]:
        """Measure modules in turn, as ``time`` measures one."""
        return time_in_turn([module for module in modules if isinstance(module, CompiledModel)], *example_inputs)

    def energies(self, modules: Sequence[Compiled], example_inputs: tuple[torch.Tensor, ...]) -> list[Energy]:
        """What one inference of each module draws; empty without ``counters``."""
        if self.counters is None:
            return []
        calls = [module.prepare(*example_inputs) for module in modules if isinstance(module, CompiledModel)]
        return energies(calls, self.counters, self.profile.cores)


def check_compiled(
    model: torch.nn.Module,
    run: Callable[..., object],
    inputs: Sequence[tuple[torch.Tensor, ...]],
    compile_model: Callable[[torch.nn.Module], Callable[..., object]],
) -> None:
    """Compare a compiled module with torch; MismatchError names the first layer that differs, found by compiling a probe."""
    try:
        check_outputs(model, run, inputs, "the compiled module")
    except MismatchError as error:
        layer = first_differing_layer(model, compile_model, inputs[0])
        where = f"; the first layer that differs is {layer!r}" if layer else "; its layers agree one by one"
        raise MismatchError(f"{error}{where}") from error
