"""Where a setting comes from, and what a bad one says."""

import stat
import subprocess
import sys

import pytest

from coserve.server.config import (
    Settings,
    SettingsError,
    parse_bytes,
    read_process_settings,
    resolve_settings,
    write_process_settings,
)


def test_command_line_over_environment_over_file_over_default(tmp_path):
    file = tmp_path / "coserve.toml"
    file.write_text('model = "from-file"\nport = 1\nhost = "file"\ntrain-window = 7\n')
    environ = {"COSERVE_PORT": "2", "COSERVE_HOST": "environment", "COSERVE_BASE_URL": "not a setting"}
    settings = resolve_settings({"port": 3, "host": None}, environ=environ, config_file=file)
    assert (settings.port, settings.host, settings.model, settings.train_window) == (3, "environment", "from-file", 7)
    assert settings.block_size == 16
    assert resolve_settings({}, environ={"COSERVE_CONFIG": str(file)}).port == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 * 2**20), ("1.5GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("64k", 2**16), ("77", 77), (77, 77)],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value
    assert resolve_settings({"model": "m", "kv_memory": text}, environ={}).kv_memory == value


@pytest.mark.parametrize(
    ("command_line", "environ", "says"),
    [
        ({}, {}, "--model"),
        ({"model": "m", "kv_memory": "5 elephants"}, {}, "--kv-memory"),
        ({"model": "m", "kv_memory": "-1"}, {}, "--kv-memory"),
        ({"model": "m"}, {"COSERVE_PORT": "http"}, "COSERVE_PORT"),
        ({"model": "m", "port": 70000}, {}, "--port"),
        ({"model": "m", "modle": "n"}, {}, "modle"),
        ({"model": "m", "slo_itl_ms": "inf"}, {}, "--slo-itl-ms cannot be used: must be a finite number"),
        ({"model": "m"}, {"COSERVE_TENANT_KV_SHARE": "nan"}, "COSERVE_TENANT_KV_SHARE .*finite"),
        ({"model": "m"}, {"COSERVE_GRACE_SECONDS": "nan"}, "COSERVE_GRACE_SECONDS .*finite"),
        ({"model": "m"}, {"COSERVE_TENANTS": '{"a": {"weight": NaN}}'}, "tenants.a.weight .*COSERVE_TENANTS .*finite"),
        ({"model": "m"}, {"COSERVE_TENANTS": '{"a": {"weight": 1e4}}'}, "tenants.a.weight .*at most 1000"),
        ({"model": "m"}, {"COSERVE_TENANTS": '{"a": {"weight": 1e-9}}'}, "tenants.a.weight .*at least 0.001"),
        ({"model": "m"}, {"COSERVE_TENANTS": '{"a": {"kv_share": NaN}}'}, "tenants.a.kv_share .*finite"),
        ({"model": "m"}, {"COSERVE_CONFIG": "/nowhere/at/all.toml"}, "/nowhere/at/all.toml"),
    ],
)
def test_a_bad_setting_names_itself_and_its_source(command_line, environ, says):
    with pytest.raises(SettingsError, match=says):
        resolve_settings(command_line, environ=environ)


def test_the_processes_read_what_was_written_and_nobody_else_can(tmp_path):
    settings = Settings(model="some/folder/tiny", kv_memory=2**20, data_dir=tmp_path)
    path = tmp_path / "settings.json"
    write_process_settings(path, settings, "/tmp/x/engine.sock")
    assert read_process_settings(path) == (settings, "/tmp/x/engine.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_base_models_id():
    assert Settings(model="/a/b/tiny-llama/").base_model_id == "tiny-llama"
    assert Settings(model="google/gemma", served_model_name="g").base_model_id == "g"


def test_the_http_side_imports_no_model_library():
    code = (
        "import sys, coserve.server.app, coserve.server.gateway.__main__, coserve.server.gateway.assembly; "
        "print([name for name in ('torch', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=150)
    assert out.stdout.strip() == "[]"
