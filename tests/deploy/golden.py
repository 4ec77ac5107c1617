"""What the chart renders for common deployments: `make deploy-golden` writes golden/ anew."""

from __future__ import annotations

from pathlib import Path

from tests.deploy.charts import CHART, GOLDEN, HERE, RELEASES, VARIANTS, helm


def path(variant: str) -> Path:
    return HERE / "golden" / f"{variant}.yaml"


def text(variant: str) -> str:
    """All manifests as helm writes them."""
    release = f"--kube-version={RELEASES[-1]}"
    done = helm(
        "template", "prod", str(CHART), "--namespace=pano", release, values=VARIANTS[variant]
    )
    done.check_returncode()
    return done.stdout


def main() -> None:
    for variant in GOLDEN:
        path(variant).parent.mkdir(exist_ok=True)
        path(variant).write_text(text(variant))


if __name__ == "__main__":
    main()
