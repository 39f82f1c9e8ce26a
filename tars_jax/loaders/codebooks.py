"""ggml's codebook types: the IQ family and the 4-bit floats, decoded to small integer codes times a scale.

A codebook type stores indices into a fixed table. Every table entry is a small integer, so a decoded weight is still
``code * scale``: ternary, 2-bit and 3-bit grids give codes within int8 and the scale takes the rest of the formula.

Source of the layouts and of the constants: llama.cpp ``ggml/src/ggml-common.h`` and ``ggml-quants.c`` (MIT licence).

An unpacker takes blocks, uint8 [n, type_size], fills ``codes``, int8 [n, block_size] (contiguous), and returns
``(scales, mins)``, each broadcastable to [n, groups]; ``mins`` is None for types without an offset.
"""

import base64
from collections.abc import Sequence

import numpy as np

Scales = tuple[np.ndarray, np.ndarray | None]


def part(blocks: np.ndarray, start: int, size: int, dtype: str) -> np.ndarray:
    """``size`` bytes from ``start`` of every block, as a [n, size / itemsize] array of ``dtype``."""
    return np.ascontiguousarray(blocks[:, start : start + size]).view(dtype)


def half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte ``start`` of every block, float16 [n, 1]."""
    return part(blocks, start, 2, "<f2")


def single(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte ``start`` of every block, widened to float32 [n, 1]."""
    return half(blocks, start).astype(np.float32)


def spread(packed: np.ndarray, width: int, bits: int, codes: np.ndarray) -> None:
    """Unpacks bit fields: in every run of ``width`` bytes, first the lowest ``bits`` of each byte, then the next, and so on.

    packed: uint8 [n, bytes]; codes: int8 or uint8 [n, bytes * 8 / bits], overwritten.
    """
    lanes = 8 // bits
    runs = packed.reshape(len(packed), -1, width)
    numbers = codes.view(np.uint8).reshape(len(packed), -1, lanes, width)
    for lane in range(lanes):
        np.right_shift(runs, np.uint8(lane * bits), out=numbers[:, :, lane])
    np.bitwise_and(numbers, np.uint8((1 << bits) - 1), out=numbers)


def fields(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """``spread`` into a new uint8 array."""
    codes = np.empty((len(packed), packed.shape[1] * 8 // bits), np.uint8)
    spread(packed, width, bits, codes)
    return codes


def _grid(text: str, width: int, values: Sequence[int]) -> np.ndarray:
    """A codebook, int8 [entries, width], from base64 of indices into ``values``, 2 bits each (4 where there are 8 values)."""
    packed = np.frombuffer(base64.b64decode(text), np.uint8)[:, None]
    numbers = fields(packed, 1, 2 if len(values) <= 4 else 4)
    return np.take(np.array(values, np.int8), numbers).reshape(-1, width)


_IQ2_XXS_GRID = _grid(
    "AAACAAUACAAKABEAFAAgACIAKAAqAEEARABQAFgAYQBkAIAAggCKAKIAAQEEARABFQFAAYQBmAEAAgICIgKCAgEEBAQQBCEEJARABEIESARgBIEEhASQBKQEAAUCBQgFIAVG"
    "BWkFgAWRBQkGEAZABoQGpAYACAUICAgUCCgIQQhECFAIUgiICAQJQAkCChQKARAEEBAQIRBAEGAQhBCQEJUQABEIESARUBFaEYARJBJFEgAUCBQgFCUUSRSAFBgVYhUAFhYW"
    "ARgEGBAYQBiBGAAZBRmgGVEaACACIAogRCBhIIAggiApIUghACICIgEkBCQQJEAkViQAJUElZCWQJggoICiUKEQqAUAEQBBAGEAhQCRAQEBIQFZAYECBQIRAkEAAQSBBYUGA"
    "QYVBAUIQQkhCVkJoQgBECEQgRIBEmUQSRSRFAEYBSARIEEhASEVIAElYSWFJgklFSpBKAFAIUBFQGVAgUIBQiFAEUUJRpFGRUpBUklQKVQFWVFYAWBFYGVhkWEBZCFoEYBBg"
    "QGBoYABhVWEYYmBiAGQFZBBlEmWEZUJoAIACgAqAQYCCgASBGIFAgRGCAYQEhBCEFYRAhGCEAIVGhZSFCYZAhmCGAogEiRGKBJAQkCSQQJChkBaRgJFFkgCUIpRElFGVgZgg"
    "mQKgUKCFoAmhAKIYpFCoBKk=",
    8,
    (8, 25, 43),
)
_IQ2_XS_GRID = _grid(
    "AAACAAUACAAKABEAFAAWABkAIAAiACUAKABBAEQARgBJAFAAUgBVAFgAYQBkAIAAggCFAIgAkQCUAJkAoAABAQQBBgEJARABEgEVARgBGgEhASQBQAFCAUUBSAFRAVQBYAFo"
    "AYEBhAGQAQACAgIFAggCEQIUAiACQQJEAlACVQKAAooCAQQEBAYECQQQBBIEFQQYBCEEJARABEIERQRIBFEEVARWBGAEgQSEBJAEAAUCBQUFCAURBRQFIAVBBUQFUAVhBYAF"
    "AQYEBhAGJgZABkIGhAYACAIIBQgICAoIEQgUCCAIJQhBCEQIUAhYCIAIoAiqCAEJBAkQCUAJgQmJCQAKIAooCpYKoAoBEAQQBhAJEBAQEhAVEBgQIRAkEEAQQhBFEEgQURBU"
    "EGAQahCBEIQQkBAAEQIRBREIERERFBEgEUERRBFQEYARlBGWEQESBBIGEhASQBJgEgAUAhQFFAgUERQUFCAUQRREFEkUUBRkFIAUARUEFRAVQBUAFhQWSRYBGAQYEBgSGEAY"
    "VBiGGAAZBRlmGVEaqRoAIAIgBSAIIAogESAUICAgQSBEIFAggCCgIAEhBCEQIUAhSCFlIQAiIiKAIqgiASQEJBAkKSRAJAAlQSVSJZklASYaJqYmACgIKAooIChVKIgooiho"
    "KZApCCogKoIqiCqKKgFABEAGQAlAEEASQBVAGEAhQCRAQEBCQEVASEBKQFFAVEBgQGVAgUCEQJBAAEECQQVBCEERQRRBIEFBQURBUEGAQYVBokEBQgRCEEISQilCQEIARAJE"
    "BUQIRBFEFEQZRCBEQURERFBEgESURAFFBEUQRSRFQEWaRQBGCkZERlBGAUgESBBIQEhFSFRIYkgASRFJRElQSWlJBEoAUAJQBVAIUBFQFFAgUChQQVBEUFBQgFABUQRREFEV"
    "UUBRQlEAUkRSqlIBVARUEFQhVEBUYFSBVKFUAFUIVYBViFUhVmhWoVYAWBRYQVhQWJlYGllAWUJZhVoBYARgEGBAYFRgYmCGYKlgAGEkYkpikmIAZBZkEGVAZUVlpGUBaGpo"
    "JWkGalRqYmoAgAKABYAIgBGAFIAggCqAQYBEgFCAgICCgKiAqoABgQSBBoEQgUCBUYFZgQCCIIKAgoKCoIKoggGEBIQQhBKEFYRAhGCEiYQAhUSFpYUYhmqGAIgIiCWIWoiA"
    "iIKIqIgGiSKKgIqIipaKqIoBkASQEJBAkFaQhJAAkSKRZJFWkomSAJQFlESUUJRYlCmVkJWSlUGWUZimmEmZFZpgmgCgAqAIoAqgIKAqoKCgUaFZoaahAKICogiiKqKAoqCi"
    "QKSVpGWmmKYKqCCoIqgoqKCoqKgEqYSphqkoqiqqkaqqqg==",
    8,
    (8, 25, 43),
)
_IQ2_S_GRID = _grid(
    "AAACAAUACAAKABEAFAAWABkAIAAiACUAKABBAEQARgBJAFAAUgBVAFgAYQBkAGYAaQCAAIIAhQCIAJEAlACgAKUAqgABAQQBBgEJARABEgEVARgBIQEkAUABQgFFAUgBUQFU"
    "AVYBWQFgAWUBaAGBAYQBkAGSAZUBoQGkAQACAgIFAggCEQIUAiACKgJBAkQCRgJJAlACVQKAAoUCigKUAqICAQQEBAYECQQQBBIEFQQYBCEEJAQmBCkEQARCBEUESARKBFEE"
    "VARWBFkEYARiBGUEgQSEBIYEiQSQBJUEmAShBKQEAAUCBQUFCAUKBREFFAUWBRkFIAUlBSgFQQVEBUYFSQVQBVIFVQVYBWEFZAWABYIFhQWIBZEFlAWgBQEGBAYGBgkGEAYV"
    "BkAGRQZIBlEGVAZgBoEGhAaQBgAIAggFCAgIEQgUCBYIGQggCCUIKghBCEQIRghJCFAIUghVCFgIYQhkCIAIhQiUCKoIAQkECRAJEgkVCRgJIQlACUUJSAlRCVQJYAmBCZAJ"
    "AAoRChQKIgooCioKUAqZCgEQBBAGEAkQEBASEBUQGBAhECQQJhBAEEIQRRBIEFEQVBBWEFkQYBBiEGUQaBCBEIQQhhCQEJUQmBChEKQQABECEQURCBEKERERFBEWERkRIBEi"
    "ESURKBFBEUQRRhFJEVARUhFVEVgRYRFkEYARghGFEYgRkRGUEQESBBIJEhASFRIhEiQSQBJFElESVBKBEoQSkBIAFAIUBRQIFBEUFBQWFBkUIBQlFCgUQRREFEYUSRRQFFIU"
    "VRRYFGEUZBSAFIIUhRSIFJEUlBSgFAEVBBUGFQkVEBUSFRUVGBUhFSQVQBVCFUUVSBVRFVQVYBWBFYQVkBUAFgUWCBYRFhQWIBZBFkQWUBaAFqoWARgEGAYYCRgQGBUYGBgh"
    "GEAYQhhFGEgYURhUGGAYgRiEGAAZAhkFGQgZERkUGSAZQRlEGVAZaRmiGQQaEBpAGlYaACACIAUgCCARIBQgFiAZICAgJSAqIEEgRCBQIFIgVSBkIIAgiiCUIKogASEEIRAh"
    "EiEVISEhQCFCIUUhUSFUIWAhgSGEIZAhACIKIiIiKCIqIkQiUCKIIooiqCIBJAQkBiQJJBAkFSQYJCEkJCRAJEIkRSRIJFEkVCRgJIEkhCSQJAAlBSUIJRElFCUgJUElRCVQ"
    "JWYlgCUBJgQmECZAJlkmACgFKBEoFChBKEQoUCiKKKooASkEKRAplSkKKiIqZCqIKooqAUAEQAZACUAQQBJAFUAYQBpAIUAkQCZAQEBCQEVASEBKQFFAVEBWQFlAYEBiQGVA"
    "gUCEQJBAlUCYQKFApEAAQQJBBUEIQRFBFEEWQRlBIEEiQSVBQUFEQUZBSUFQQVJBVUFYQWFBZEGAQYJBhUGIQZFBlEGgQQFCBEIQQhJCFUIYQiRCQEJFQkhCUUJUQmBCgUKE"
    "QgBEAkQFRAhECkQRRBREFkQZRCBEIkQlRChEQUREREZESURQRFJEVURYRGFEZESARIJEhUSIRJFElESgRAFFBEUGRQlFEEUSRRVFGEUhRSRFQEVCRUVFSEVRRVRFYEVqRYFF"
    "hEWQRQBGAkYFRghGEUYURiBGQUZERlBGgEalRgFIBEgJSBBIEkgVSBhIIUgkSEBIQkhFSEhIUUhUSGBIhEiQSABJAkkFSQhJEUkUSSBJQUlESVBJgEmWSQFKBEoQSkBKAFAC"
    "UAVQCFARUBRQFlAZUCBQIlAlUChQQVBEUEZQSVBQUFJQVVBYUGFQZFCAUIJQhVCIUJFQlFABUQRRBlEJURBRElEVURhRIVEkUUBRQlFFUUhRUVFUUWBRgVGEUZBRAFIFUghS"
    "EVIUUiBSQVJEUlBSaVKAUgFUBFQGVAlUEFQSVBVUGFQhVCRUQFRCVEVUSFRRVFRUYFSBVIRUkFQAVQJVBVUIVRFVFFUgVUFVRFVQVYBVAVYEVhBWJlZAVgBYAlgFWAhYEVgU"
    "WCBYQVhEWFBYWliAWAFZBFkQWUBZAFoZWoVaqFoBYARgBmAQYBJgFWAYYCFgJGBAYEVgSGBRYFRgYGCEYJBgAGECYQVhCGERYRRhIGFBYURhUGGAYZlhBGIQYkBiVmKhYgBk"
    "BWQIZBFkFGQgZEFkRGRQZIBkAWUEZRBlQGVKZWhlkmUAZpRmAWgEaBBoZWiYaABpKmlCaqFqAIACgAWACIARgBSAGYAggCWAQYBEgFCAUoBVgFiAYYCAgIWAkYCUgAGBBIEJ"
    "gRCBEoEVgRiBIYEkgUCBQoFFgUiBUYFUgYGBhIGQgamBAIIFggqCEYIUgkGCRIJQggGEBIQGhAmEEIQShBWEGIQhhECEQoRFhEiEUYRUhGCEgYSEhJCEAIUChQWFCIURhRSF"
    "IIVBhUSFUIWAhYqFAYYEhhCGKYZAhgCIBYgRiBSIQYhEiFCIoogBiQSJQIlliSKKWIpaioKKoooBkASQCZAQkBKQFZAYkCSQQJBCkEWQSJBRkFSQYJCBkISQkJAAkQWREZEU"
    "kUGRRJFQkVqRAZIEkhCSQJKmkgCUApQFlAiUEZQUlCCUQZRElFCUgJSWlAGVBJUQlUCVmJWhlQCWRpZklgGYBJgQmCaYQJipmACZSZlSmZCaAKAFoAqgFKAioCqgQaBEoFCg"
    "oqCqoEChZaECogqiIqIooiqigqKIooqiqKIBpASkEKRApImkpKQApRmlUaYKqCiooqhUqYapCKoKqiCqIqooqoiqqqo=",
    8,
    (8, 25, 43),
)
_IQ3_XXS_GRID = _grid(
    "AAACAAQAEQATABcAIAAiADEAQgBzAHUAAQEDARABEgEhASUBMAEyAUEBVAFwAQACAgIEAhECIAIiAjECMwI3AlECVwJ1AgEDBwMQAxIDJQNwAxMENwREBFcEcwR1BAEFBwUy"
    "BVIFNQZkBhAHFAcWB0MHYQcBEAMQEBASECEQIxAwEDIQNBBHEFAQABECERERIBEiEQESAxIQEhISIRIwEnISABMCEyATMRNGE2YTARQFFFAUIBUkFUYVcRUFFiIXQBcAIAIg"
    "ESATICAgIiAmIDEgQiABIQMhBSEQIRIhISEwIWMhZyFwIQAiAiIRIhciICIiIjciQCJVIgEjECMUI3AjdCM1JFMkAyUnJUEldCUBJwMnFidFJwEwEDASMCEwIzBQMGUwcjAA"
    "MQIxIDExMUQxRjEBMgMyEDIlMlIycjIRMzMzMDRHNHI0ADUGNSI1VTUUNjY2YzYzN2A3BEAXQDVAN0BTQFdAdEEgQjdCQEJgQmZCB0NFQwREUURkRCVFQ0VwRQVHEEcSRzBH"
    "ElBBUHBQAFEGUSZRVVEUUjJSclICU1NTEFQjVCdUclQCVTFVUFYkV0JXJGBEYEZgZGAhYWFhF2JkYjBjNmNEZAVlUmUzZgNnIWcDcAVwB3AQcDJwUnAmcUBxEnJFclJyAHMV"
    "czNzYHMhdEF0AHUCdSR1MHY=",
    4,
    (4, 12, 20, 28, 36, 44, 52, 62),
)
_IQ3_S_GRID = _grid(
    "AAABAAIABQAHABAAEQASABQAFgAgACEAJQAzAEAAQgBFAEcAUQBTAGAAYgBxAHQAdwAAAQEBAgEEARABEQEVASABIwEnATEBNQFEAWEBZQFyAQACAQIFAgcCEAITAhYCIQIl"
    "AjACNAJCAkUCRwJRAlMCcAJzAgMDEQMVAyADIgMxAzMDNgNEA1ADUgNnA3EDdQMABBMEFwQhBCQEMgRABEMEUQRwBAIFBAUgBSIFJgUzBUEFRQVHBWYFcwUGBhEGEwYxBlIG"
    "cQYABwIHBAcgByIHJgczB1AHVAcAEAEQAhAEEBAQERATEBUQFxAgECIQMRA0EDYQVBBWEGEQchAAEQERAxEGERARFBEhETARMxFBEVARUhFwEXYRABISEhUSFxIgEiQSMhJA"
    "EkMSVRJgEnISARMEEwcTEBMTEyETJxMwEzQTQRNiE3ATAxQFFBIUFBQxFDMUQhRGFFAUVBQBFRAVExUhFTAVMhVRFSAWJBYnFkQWRhYBFwMXEBcSFyEXNRdBF2IXcBcAIAEg"
    "AyAFIAcgECASIBQgFiAhICMgJyAwIDIgQSBDIEUgUCBSIGcgcCBzIHUgACECIRAhEyEXISIhJSExITQhQiFRIQEiBCIHIiEiIyIwIjciQSJTIlcicSJ0IgAjAiMFIxEjIiMk"
    "IzEjMyNCI1AjZiMBJAckICQjJDIkNSRBJHIkdSQEJRElIiU3JUAlUyVwJQAmAiYHJiEmVSZhJgUnEScmJzAnQydQJwIwETATMBUwFzAiMDEwMzA1MEIwRDBHMFEwYzBxMAEx"
    "AzEFMRQxITEjMUAxYDFyMXYxADISMiAyMjI0MlAyATMQMxQzITMjMyczMDNBM0MzRzNVM3MzAzQRNBY0IjQxNFI0YDRkNAE1EDUSNSU1MjVENVY1czUWNkE2ATcDNyA3Ijc1"
    "NwBABEASQCBAJEAnQDJAQUBQQHBAAkEHQRFBE0EiQTBBNUFDQVFBVUEBQgNCEEIVQiFCM0JAQldCYkJwQgRDEUMTQyBDIkMxQzVDAEQCRCREN0RARHFEBUUHRSFFYkUTRjRG"
    "YEYQRxVHMEdDR1FHAlAQUBRQIlBAUERQR1BSUGZQdFABUQNRBVESUSFRMlFyUQBSEVIjUjBSNlJTUgJTB1MQUydTRFNRU2VTc1MBVARUIFQyVEZUElUmVVFVU1VCVgJXBFci"
    "VxFgE2AVYDFgM2BgYABhIGEnYWRhEmI0YkJiVWJiYnBiAGMUYyFjQGMlZENkYmQAZQNlNGVgZQVmQGYRZxNnAHAEcAdwIHAicDZwQHBUcGJwAnERcSRxQ3FFcQFyBHIQchZy"
    "IXIwclFyAnMyczVzU3MBdAV0E3QgdFB0InVCdQJ2MXYAdw==",
    4,
    range(1, 16, 2),
)
_IQ1_GRID = _grid(
    "AAACAAUACAAKABEAFQAgACIAKAAqAEUAUQBUAFYAZQCAAIIAiACKAJUAoACiAKgAqgAEAQUBEQEUARYBGQEaASUBQQFGAUkBUgFVAVoBYQFkAWYBaAGFAZEBlAGWAaUBAAIC"
    "AggCCgIVAiACIgIoAioCRQJRAlkCZAJpAoACggKIAooCkQKVApkCoAKiAqgCqgIRBBQEFgQlBEEESQRVBFoEZARlBJEEmQSlBAEFBAUFBQYFFQUYBRoFKQVABUUFSgVQBVEF"
    "VAVVBVYFWQVgBWIFZQVoBWoFgQWRBZUFmAWaBaEFpAWlBaYFqQUUBhkGQQZEBlAGUgZVBlgGYAZhBmYGaQaFBpEGlAaZBgAIAggICAoIFQggCCIIKAgqCEUIUQhWCGUIgAiC"
    "CIgIigiVCKAIogioCKoIBQkRCRQJGQkkCSUJQQlQCVEJVQlhCWQJaQmRCZQJlgmZCaUJAAoCCggKCgoVCiAKIgooCioKRQpRClkKYQplCoAKggqFCogKigqVCqAKogqoCqoK"
    "EBAREBQQGRAkECUQQRBEEFAQVRBYEGEQZBBlEGkQkRCUEJYQoRClEAERBBEGEQkREBESERURGBEhESQRKRFFEUoRUBFREVIRVBFVEVYRWRFgEWURhBGSEZURoRGkERESFBIW"
    "EiUSQBJGEkkSUhJVElgSWhJkEmYShRKREpQSlhKlEgEUBhQJFBQUFRQYFBkUIRQmFEEURRRGFEgUShRRFFQUVRRWFFkUYhRlFGgUhBSJFJAUlBSVFJgUmRSaFKEUpBSlFKkU"
    "AhUFFQoVERUUFRUVFhUZFSAVIhUlFSgVKhVBFUQVRRVGFVEVUhVUFVUVVhVZFVoVYRVkFWUVZhVpFYAVghWEFYUViBWKFZAVkRWUFZUVlhWZFZoVoBWiFaUVARYEFgUWBhYV"
    "FhYWGBYaFiEWJhZAFkIWRBZFFkgWShZRFlUWVhZYFlkWYRZkFmUWaBZpFmoWhhaKFpIWlRakFqkWERgWGCUYQRhEGEYYSRhQGFUYWBhaGGAYYRhkGGYYaRiFGJEYlBilGBAZ"
    "EhkVGRoZIRklGUIZRBlFGUgZURlUGVUZVhlZGVoZYBllGWoZiRmRGZIZlRmYGaEZphmpGQkaFhokGiYaRBpGGkkaUBpSGlUaWBphGmYaaRqFGpEalhqaGgAgAiAIIAogFSAg"
    "ICIgJSAoICogRSBRIFkgYSBlIIAggiCIIIoglSCgIKIgpSCoIKogBSERIRQhGSElIUIhRCFJIVUhWCFaIWEhZCFlIWYhhSGQIZYhmSGlIQEiCCIKIhEiFSIgIiIiKCIqIkUi"
    "USJWIlkiZSKBIogiiiKRIpUioCKiIqgiqiIFJBQkFiQZJCUkRCRFJEYkSSRSJFUkWCRaJGYkhSSRJJQkmSShJKUkCSUVJSElKSVAJUUlSCVRJVQlVSVZJWIlZSVoJYklkCWU"
    "JZUlmCWaJaElpCWmJaklBSYQJhImGSYlJkEmSSZVJmAmYSZpJoQmhiaQJpomACgCKAgoCigVKCAoIigoKCooRShRKFQoZSiAKIIoiCiKKKAooiioKKooCSkRKRQpGSklKUYp"
    "SSlSKVUpYSlkKWYpaSmFKZAplimZKaQppSkAKgIqCCoKKiAqIiooKioqRSpRKlYqWSplKoAqgiqIKooqlSqgKqIqqCqqKgVAEUAWQCVASUBSQFVAWEBaQGFAZEBmQJRAmUCh"
    "QKZAAEEBQQRBBkEJQRJBFUEWQRhBGkEhQSZBKUFFQUhBSkFRQVRBVUFWQVlBWkFlQWhBakGBQYRBhkGQQZJBlUGgQaFBokEFQhFCFEIWQiVCQUJSQlVCWkJkQmlCiUKUQqVC"
    "AUQVRBlEKURFREhESkRRRFREVURWRGFEYkRlRGhEakSBRIZEiUSQRJJElUSgRKFEqUQBRQJFBUUKRRFFFEUVRRZFGUUgRSVFKkVBRURFRUVGRUlFUEVRRVRFVUVWRVhFWUVh"
    "RWRFZUVmRWlFgkWERYVFiEWRRZRFlUWWRZlFmkWlRahFqkUBRgVGCUYURhVGGEYaRiFGJEYpRkBGQkZFRkhGUEZRRlJGVUZWRllGYkZlRmhGgUaFRopGlEaVRqFGpEamRgVI"
    "EUgVSBpIJUhCSElIUEhVSFhIYUhkSGZIaUiFSJFIlEiWSJlIpUgBSQVJBkkKSRBJFEkVSRhJIUkkSSZJQElFSUpJUUlSSVRJVUlWSVlJYEliSWVJZklqSYZJiUmSSZVJlkmY"
    "SaFJpEmmSalJFkpESkZKSUpVSlhKWkpkSmlKlEqlSgFQBFAFUAZQCVASUBVQGlAhUCRQKVBAUEVQSFBRUFRQVVBWUFlQZVBoUIZQiVCVUJhQoFChUKZQqVAFUQhRCVEKURFR"
    "FFEVURZRGFEZUSBRJVEmUShRKlFBUURRRVFGUUlRUFFRUVJRVFFVUVZRWFFZUVpRYVFkUWVRZlFpUYJRhVGRUZRRlVGWUZlRoFGlUapRAVIGUhJSFVIaUiFSJFJCUkVSSlJR"
    "UlRSVVJWUllSYlJlUoVSkFKSUpVSmVKaUqRSBFQFVBFUFFQVVBZUGFQZVCFUJVQoVCpUQVREVEVURlRJVEpUUFRRVFRUVVRWVFhUWVRaVGFUYlRkVGVUZlRpVIBUiFSKVJFU"
    "lFSVVJZUmVShVKRUpVSqVAFVAlUEVQVVBlUJVRBVEVUSVRRVFVUWVRlVGlUhVSRVJVUmVSlVQFVBVUJVRFVFVUZVSFVJVVBVUVVSVVRVVVVWVVhVWVVaVWBVYVVkVWVVZlVo"
    "VWlValWBVYRVhVWJVYpVkFWRVZRVlVWWVZhVmVWhVaRVpVWmValVAFYBVgJWBFYGVghWCVYRVhRWFVYYVhlWIFYhViJWJFYlViZWKFYpVkFWRVZGVkhWSVZKVlBWUVZSVlRW"
    "VVZWVlhWWVZaVmFWZFZlVmlWglaFVoZWiFaJVopWkVaVVppWolalVqZWqFapVgRYBVgGWAlYEFgVWBhYIVgqWEVYSFhKWFFYVFhVWFZYWFhZWGBYYlhkWGVYgliJWJBYkliV"
    "WJhYoVipWAFZAlkFWQpZEVkUWRVZFlkZWSVZQVlEWUVZRllJWVBZUVlSWVRZVVlWWVhZWVlaWWFZZFllWWZZaVmBWYVZiVmRWZRZlVmWWZhZmVmlWQRaCFoVWhpaIFolWiZa"
    "KVpFWkhaSVpRWlVaVlpYWllaYlplWmhaalqBWopaklqVWpZamFqaWqFaBWAUYBZgGWAlYERgUGBVYFZgWGBaYGFgZGBmYGlggWCWYKVgAWEEYQZhCWESYRVhIWEiYSZhKWFF"
    "YUlhUWFVYVZhWWFlYWZhamGEYYphkmGVYaFhpmGpYRFiFmIZYkBiQWJGYlViVmJYYmBihWKRYpZipWIRZBJkFWQWZBpkIWQmZClkQGRCZEVkSGRKZFFkVGRVZFZkWWRaZGBk"
    "YmRlZIRkhWSJZJBkkmSUZJVklmSYZJpkoWSkZKlkBWUIZQplEWUVZRZlGWVEZUVlRmVJZVBlUWVUZVVlVmVZZWFlZGVlZWZlaWWGZYllimWRZZVllmWZZZplomWlZaZlqGUC"
    "ZglmFWYgZiZmKGYpZkBmRWZIZkpmUWZUZlVmVmZYZlpmYGZlZmhmgGaCZoVmimaUZpZmmGaZZqBmpGamZqpmFmgZaCVoQWhSaFVoWmhhaGlohWiRaJhopmgBaQRpEGkVaSFp"
    "JGkmaSlpQGlBaUVpRmlIaVFpVGlVaVZpWWlgaWVpammCaYRpimmVaaFppGmlaalpEWoWahhqQWpEaklqUGpValhqWmpkamVqaWqGapRqmGqaaqZqAIACgAiACoAggCKAKIAq"
    "gEWAUIBRgFSAVoBZgGWAgICCgIiAioCVgKCAooCogKqABYERgRSBFoEZgSWBQYFEgUmBUIFSgVWBVoFYgVmBZIFmgWmBhYGJgZSBloGZgaWBAIICggiCCoIVgiCCIoIogiqC"
    "UYJUglmCZYKAgoKCiIKKgpWCoIKigqiCqoIUhBmEQYREhFGEVYRahGGEZIRphJSEmYQBhQmFEoUVhRqFJoUphUCFQYVFhUiFUYVUhVWFVoVZhVqFZYVmhWiFaoWBhYSFhoWJ"
    "hZCFkoWVhZiFpoURhhaGGYYlhkGGRIZJhkqGUIZVhlmGWoZhhmaGaoaFhpGGmoakhgCIAogIiAqIFYggiCKIKIgqiEGIRYhRiFSIWYhliGmIgIiCiIiIioiViKCIooioiKqI"
    "BYkGiRGJFIkWiSWJQYlEiUaJSYlQiVKJVYlaiWGJZImFiZaJmYmliQCKAooIigqKFYogiiKKKIoqikWKUYpUilaKgIqCioiKioqViqCKooqoiqqKBZARkBaQGJAZkCWQQZBG"
    "kEmQVZBYkFqQaZBqkIWQkZCUkJaQmZClkAGRBJEGkQmREJEVkRiRGpEhkSSRJpEpkUCRRZFQkVGRVJFVkVaRWZFikWWRhJGGkZKRlZGYkaGRpJGmkamRBZIRkhSSGZIlkkSS"
    "RpJJklCSUpJVkliSZpJpkoWSlJKWkqmSAZQElAaUEJQVlBiUJpRAlEqUUZRUlFWUVpRYlFmUYJRhlGKUZZSElIaUkpSUlJWUmJShlKmUAJUFlQiVCpUQlRGVFJUVlRaVGZUh"
    "lSWVKZUqlUGVRJVFlUaVSZVQlVGVUpVUlVWVVpVYlVmVWpVhlWSVZZVmlWmVgZWFlYiVkZWSlZSVlZWWlZmVmpWglaKVpZWolaqVAZYElhCWFZYZliCWJpYplkWWSJZJllGW"
    "UpZVllaWWZZllmiWgpaElomWipaSlpSWlZaklqaWqZYFmBaYGZglmEGYRphQmFKYVZhWmFqYZJhlmIWYkZiWmJmYpZgEmQaZCZkQmRKZFZkYmRqZIJkhmSSZJplAmUKZRZlI"
    "mUqZUZlUmVWZVplZmWKZZZlmmWqZgZmEmZCZkpmVmZqZoZmmmQWaFZolmkSaRppJmlCaVZpYmmGahZqRmpSalZqWmgCgAqAIoAqgFaAgoCKgKKAqoEWgUaBUoFagWaCAoIKg"
    "iKCKoJWgoKCioKigqqAFoQmhEaEUoRahGaEaoUahSaFRoVWhWKFaoWGhZKGFoZChkqGWoZmhAqIIogqiEKIZoiKiKKIqokWiUaJWolmiZaKAooKiiKKKopWioKKioqiiqqIZ"
    "pCWkQaREpFCkVKRVpFikWqRhpGWkZqRopGmkhaQGpQmlEKUSpRWlGKUmpSmlQqVFpVGlVKVVpValWaVlpWqlgaWEpYWlhqWJpZKllaWYpQWmEaYWphqmIaYlpkSmRqZKplKm"
    "VaZWplimYKZipoamkKaVppammaahpqSmpqYAqAKoCKgKqCCoIqgoqCqoUahUqFaoWaiAqIKoiKiKqJWooKiiqKioqqgFqRSpGakhqSWpQalQqVWpWqlhqWapaamQqZapAKoC"
    "qgiqCqogqiKqKKoqqlGqVKpWqoCqgqqIqoqqlaqgqqKqqKqqqg==",
    8,
    (-8, 0, 8),
)

# Row b holds the signs of the bits of byte b, lowest first: a set bit is -1.
_SIGNS = (1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")).astype(np.int8)
# Seven stored signs; the eighth makes their number even.
_EVEN_SIGNS = _SIGNS[[bits | (bits.bit_count() & 1) << 7 for bits in range(128)]]

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_E2M1_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice the OCP value


def _e8m0_halves() -> np.ndarray:
    """Half of 2^(byte - 127), float32 [256]; the smallest two are subnormal. Half, because the e2m1 codes are doubled."""
    exponents = np.arange(256, dtype=np.uint32)
    return (
        np.where(exponents < 2, 0x00200000 << np.minimum(exponents, 1), np.maximum(exponents, 1) - 1 << 23)
        .astype(np.uint32)
        .view(np.float32)
    )


def _ue4m3_halves() -> np.ndarray:
    """Half of the e4m3 value of a byte, float32 [256]; the sign bit is ignored and 0x7F, its NaN, is 0 as in ggml."""
    exponent, mantissa = np.arange(256) >> 3 & 15, np.arange(256) & 7
    value = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[0x7F] = 0
    return (value / 2).astype(np.float32)


_E8M0 = _e8m0_halves()
_UE4M3 = _ue4m3_halves()


def _signed(grid: np.ndarray, index: np.ndarray, signs: np.ndarray, sign_index: np.ndarray, codes: np.ndarray) -> None:
    """codes = grid[index] * signs[sign_index]; a sign entry covers 8 weights, a grid entry 4 or 8."""
    points = np.take(grid, index, axis=0).reshape(codes.shape)
    np.multiply(points, np.take(signs, sign_index, axis=0).reshape(codes.shape), out=codes)


def _nibble_scales(packed: np.ndarray) -> np.ndarray:
    """Two 4-bit scales a byte, lower first, as float32."""
    return fields(packed, 1, 4).astype(np.float32)


def _table(values: np.ndarray, codes: np.ndarray) -> None:
    """Replaces codes 0..15 by values[code]; bytes.translate needs no index array eight times the size of the codes."""
    table = values.tobytes().ljust(256, b"\0")
    codes[...] = np.frombuffer(codes.tobytes().translate(table), np.int8).reshape(codes.shape)


def iq2_xxs(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    words = part(blocks, 2, 64, "<u4").reshape(-1, 8, 2)  # four grid indices; four 7-bit signs and a 4-bit scale
    signs = words[:, :, 1:] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    _signed(_IQ2_XXS_GRID, np.ascontiguousarray(words[:, :, 0]).view(np.uint8), _EVEN_SIGNS, signs, codes)
    return single(blocks, 0) * ((words[:, :, 1] >> 28).astype(np.float32) + np.float32(0.5)) * np.float32(0.25), None


def iq2_xs(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    words = part(blocks, 2, 64, "<u2")  # 9-bit grid index, 7-bit signs
    _signed(_IQ2_XS_GRID, words & 511, _EVEN_SIGNS, words >> 9, codes)
    return single(blocks, 0) * (_nibble_scales(blocks[:, 66:]) + np.float32(0.5)) * np.float32(0.25), None


def iq2_s(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    index = blocks[:, 2:34] | fields(blocks[:, 66:74], 1, 2).astype(np.uint16) << 8
    _signed(_IQ2_S_GRID, index, _SIGNS, blocks[:, 34:66], codes)
    return single(blocks, 0) * (_nibble_scales(blocks[:, 74:]) + np.float32(0.5)) * np.float32(0.25), None


def iq3_xxs(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    words = part(blocks, 66, 32, "<u4")  # four 7-bit signs and a 4-bit scale
    signs = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    _signed(_IQ3_XXS_GRID, blocks[:, 2:66], _EVEN_SIGNS, signs, codes)
    return single(blocks, 0) * ((words >> 28).astype(np.float32) + np.float32(0.5)) * np.float32(0.5), None


def iq3_s(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    index = blocks[:, 2:66] | fields(blocks[:, 66:74], 1, 1).astype(np.uint16) << 8
    _signed(_IQ3_S_GRID, index, _SIGNS, blocks[:, 74:106], codes)
    return single(blocks, 0) * (2 * _nibble_scales(blocks[:, 106:]) + 1), None


def _iq1(index: np.ndarray, negative: np.ndarray, codes: np.ndarray) -> None:
    """codes = 8 * grid + delta, for a delta of +-1/8; index and negative (0 or not) have one entry for 8 weights, [n, 32]."""
    delta = np.where(negative, np.int8(-1), np.int8(1))
    np.add(np.take(_IQ1_GRID, index, axis=0), delta[:, :, None], out=codes.reshape(-1, 32, 8))


def iq1_s(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    high = part(blocks, 34, 16, "<u2")  # four 3-bit index tops, a 3-bit scale, the sign of delta
    tops = (high[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 32)
    _iq1(blocks[:, 2:34] | tops << 8, np.repeat(high >> 15, 4, axis=1), codes)
    return single(blocks, 0) * (2 * (high >> 12 & 7) + 1).astype(np.float32) / 8, None


def iq1_m(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    high = fields(blocks[:, 32:48], 1, 4)  # 3-bit index top, the sign of delta
    _iq1(blocks[:, :32] | (high & 7).astype(np.uint16) << 8, high & 8, codes)
    words = part(blocks, 48, 8, "<u2")  # four 3-bit scales and four bits of the float16
    bits = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=1, keepdims=True)
    scales = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    return bits.view(np.float16).astype(np.float32) * (2 * scales + 1).astype(np.float32) / 8, None


def iq4_nl(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 2:], 16, 4, codes)
    _table(IQ4_VALUES, codes)
    return half(blocks, 0), None


def iq4_xs(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 8:], 16, 4, codes)
    _table(IQ4_VALUES, codes)
    scales = fields(blocks[:, 4:8], 1, 4) | fields(blocks[:, 2:4], 1, 2) << 4
    return single(blocks, 0) * (scales.astype(np.float32) - 32), None


def mxfp4(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 1:], 16, 4, codes)
    _table(_E2M1_VALUES, codes)
    return _E8M0[blocks[:, :1]], None


def nvfp4(blocks: np.ndarray, codes: np.ndarray) -> Scales:
    spread(blocks[:, 4:], 8, 4, codes)
    _table(_E2M1_VALUES, codes)
    return _UE4M3[blocks[:, :4]], None
