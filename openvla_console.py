"""The console script `openvla`, outside of the package: it answers --help and wrong options before the root of the
package is executed, which takes seconds. `cli_options.execute_root` does that when a verb begins to work."""


def main() -> None:
    import openvla_light  # noqa: F401, I001 - before the package

    from openvla.cli import main

    main()
