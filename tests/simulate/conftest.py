from support.devices import device, make_device, profile  # noqa: F401 - fixtures
