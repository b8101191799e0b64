from prad.generation import PromptAdapter as PromptAdapter
from prad.generation import model_folder as model_folder

__version__: str
