from .interpreter import use_interpreter

use_interpreter()
