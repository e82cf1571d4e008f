"""hatchling's hook: compiles the kernels when the package is installed or a wheel is built.

With GCC on Linux on x86-64, the wheel carries the libraries and is for that platform. Elsewhere the wheel is for every platform, and
torch's own kernels are used. TRAMONTANE_REQUIRE_NATIVE=1 makes a build without the libraries an error.
"""

import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Not a manylinux tag: the compiler's C library decides on which systems the wheel runs.
WHEEL_TAG = "py3-none-linux_x86_64"


class NativeBuildHook(BuildHookInterface[Any]):
    """hatchling finds the class by its base, and runs it for `pip install -e .` too, where `version` is "editable"."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # The package that is being built is not installed yet.
        sys.path.insert(0, self.root)
        from workers.native.build import BuildError, build, must_fail
        from workers.native.variants import FOLDER, VARIANTS

        try:
            build()
        except BuildError as e:
            if must_fail(e):
                raise
            self.app.display_warning(f"The wheel has no compiled kernels. {e}")
            return
        if version == "standard":
            build_data["pure_python"] = False
            build_data["tag"] = WHEEL_TAG
            build_data["artifacts"] += [
                variant.library_path(FOLDER).relative_to(self.root).as_posix() for variant in VARIANTS
            ]
