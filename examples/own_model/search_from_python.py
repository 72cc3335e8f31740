"""The same search through the API: a `Task` object in, the measured front out."""

from __future__ import annotations

from own_task import make_task

import autocomp


def main() -> None:
    result = autocomp.search(
        task=make_task(), profiles=["x86-host"], trials=100, measurements=12, seed=0, out="runs/breast-cancer-api"
    )
    print(result.to_frame().to_string())

    best = result.best(max_drop=0.01)
    milliseconds = best.latency["x86-host"].seconds * 1e3
    print(f"{best.candidate.id}: {best.metrics['accuracy']:.4f} in {milliseconds:.4f} ms, {best.bytes} bytes")
    print(best.load())  # an ordinary nn.Module, smaller


if __name__ == "__main__":
    main()
