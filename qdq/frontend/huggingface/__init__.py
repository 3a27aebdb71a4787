"""A local Hugging Face folder becomes an ONNX file and samples for it: `hf:FOLDER`.

config.json -> `tasks` -> what is exported -> `network` the model -> `forms` its plain tensors -> ONNX
tokenizer or processor, the user's text, pictures or recordings -> `samples` -> .npz files
Nothing is downloaded, and no code of the folder runs unless it is trusted.
"""
