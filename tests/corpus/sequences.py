"""Decoders of transformers, with and without their cache as explicit state, and its speech models; small configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from corpus.entry import Entry, Input, mask, tokens
from corpus.from_transformers import TEXT, TINY, entry, make
from corpus.packages import transformers

LAYERS, HEADS, KV_HEADS, HEAD = 1, 4, 2, 16
_LLM = {
    **TEXT,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": HEAD,
}


class WithCache(nn.Module):
    """One step of a decoder whose keys and values are inputs and outputs: [N, 1] tokens and, per layer, two [N, heads, past, head]."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = transformers().DynamicCache(config=self.decoder.config)
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        out = self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        state = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *state)


class Unmasked(nn.Module):
    """A decoder called with its tokens alone, returning its logits alone."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.decoder(input_ids=ids, use_cache=False).logits
        return logits


class Seq2Seq(nn.Module):
    """An encoder and a decoder: both their tokens are inputs, logits the output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits
        return logits


def _wrapped(wrapper: type[nn.Module], model: str, config: str, options: dict[str, Any]) -> nn.Module:
    return wrapper(make(model, config, options))


def _cached(name: str, model: str, config: str, heads: int = KV_HEADS, past: int = 12, **options: Any) -> Entry:
    state = tuple(Input((heads, past, HEAD)) for _ in range(2 * LAYERS))
    made = partial(_wrapped, WithCache, model, config, options)
    return Entry(f"transformers/{name}_cached", "cache", made, (tokens(1), *state))


def _logits(name: str, model: str, config: str, **options: Any) -> Entry:
    return Entry(f"transformers/{name}", "decoder", partial(_wrapped, Unmasked, model, config, options), (tokens(),))


def _llm(name: str, model: str, **options: Any) -> Entry:
    return _logits(name, f"{model}ForCausalLM", f"{model}Config", **{**_LLM, **options})


def _seq2seq(name: str, model: str, config: str, **options: Any) -> Entry:
    return Entry(
        f"transformers/{name}", "decoder", partial(_wrapped, Seq2Seq, model, config, options), (tokens(), tokens(8))
    )


_GPT2 = {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": LAYERS, "n_head": HEADS}
_NEOX = {**TEXT, "num_hidden_layers": LAYERS, "bos_token_id": 1, "eos_token_id": 2}
_SPEECH = {
    **TINY, "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "vocab_size": 30,
}  # fmt: skip
_WAVE = (Input((1600,)),)
_S2S = {
    "vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _whisper_encoder() -> nn.Module:
    package = transformers()
    config = package.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_mel_bins=80, max_source_positions=50, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    encoder: nn.Module = package.WhisperModel(config).encoder
    return encoder


class _Codec(nn.Module):
    """EnCodec without its codebooks: waveform to latent and back, convolutions, transposed convolutions and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers().EncodecConfig(
            num_filters=16, hidden_size=64, codebook_dim=64, num_lstm_layers=1, upsampling_ratios=[4, 2]
        )
        model = transformers().EncodecModel(config)
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, wave: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(wave))
        return out


class _Vits(nn.Module):
    """The vocoder of SpeechT5 (HiFi-GAN): transposed convolutions with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        package = transformers()
        self.vocoder = package.SpeechT5HifiGan(
            package.SpeechT5HifiGanConfig(
                model_in_dim=40, upsample_initial_channel=64, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
                resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3], [1, 3]],
            )
        )  # fmt: skip

    def forward(self, spectrogram: Tensor) -> Tensor:
        wave: Tensor = self.vocoder(spectrogram)
        return wave


SEQUENCES: tuple[Entry, ...] = (
    # decoders as they are called: ids and a mask, their cache returned beside the logits
    entry("gpt2", "decoder", (tokens(),), "GPT2LMHeadModel", **_GPT2),
    entry("llama", "decoder", (tokens(), mask()), "LlamaForCausalLM", **{**_LLM, "num_hidden_layers": 2}),
    # logits of ids
    _logits("gpt2_logits", "GPT2LMHeadModel", "GPT2Config", **_GPT2),
    _logits("gpt_neo", "GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=100, hidden_size=64, num_layers=2, num_heads=4,
        max_position_embeddings=64, window_size=8, attention_types=[[["global", "local"], 1]]),
    _logits("gptj", "GPTJForCausalLM", "GPTJConfig", **_GPT2, rotary_dim=8),
    _logits("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **_NEOX),
    _logits("opt", "OPTForCausalLM", "OPTConfig", vocab_size=100, hidden_size=64, num_hidden_layers=1, ffn_dim=128, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64),
    _logits("bloom", "BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=64, n_layer=1, n_head=4),
    _logits("falcon", "FalconForCausalLM", "FalconConfig", vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
    _logits("mpt", "MptForCausalLM", "MptConfig", vocab_size=100, d_model=64, n_layers=1, n_heads=4, max_seq_len=64),
    _llm("llama_logits", "Llama"),
    _llm("mistral", "Mistral", sliding_window=8),
    _llm("qwen2", "Qwen2"),
    _llm("qwen3", "Qwen3"),
    _llm("gemma2", "Gemma2", num_hidden_layers=2, sliding_window=8),
    _logits("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **{**_LLM, "num_hidden_layers": 2}, sliding_window=8),
    _llm("phi3", "Phi3"),
    _llm("olmo2", "Olmo2"),
    _llm("cohere", "Cohere"),
    _logits("mamba", "MambaForCausalLM", "MambaConfig", vocab_size=100, hidden_size=32, state_size=8, num_hidden_layers=1,
        time_step_rank=4),
    _llm("mixtral", "Mixtral", num_local_experts=4),
    # one step with keys and values as inputs and outputs
    _cached("gpt2", "GPT2LMHeadModel", "GPT2Config", HEADS, **_GPT2),
    _cached("llama", "LlamaForCausalLM", "LlamaConfig", **_LLM),
    _cached("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **_LLM),
    _cached("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", HEADS, **_NEOX),
    # encoder and decoder
    _seq2seq("t5", "T5ForConditionalGeneration", "T5Config", vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0),
    _seq2seq("bart", "BartForConditionalGeneration", "BartConfig", **_S2S),
    # speech
    entry("wav2vec2", "speech", _WAVE, "Wav2Vec2ForCTC", **_SPEECH),
    entry("wav2vec2_stable", "speech", _WAVE, "Wav2Vec2Model", "Wav2Vec2Config", **_SPEECH, do_stable_layer_norm=True,
        feat_extract_norm="layer"),
    entry("hubert", "speech", _WAVE, "HubertModel", **_SPEECH),
    entry("data2vec_audio", "speech", _WAVE, "Data2VecAudioModel", "Data2VecAudioConfig", **_SPEECH, num_feat_extract_layers=3),
    entry("wavlm", "speech", _WAVE, "WavLMModel", "WavLMConfig", **_SPEECH),
    entry("sew", "speech", _WAVE, "SEWModel", "SEWConfig", **_SPEECH, squeeze_factor=2),
    entry("wav2vec2_conformer", "speech", _WAVE, "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **_SPEECH,
        position_embeddings_type="relative", conv_depthwise_kernel_size=7),
    entry("wav2vec2_bert", "speech", (Input((40, 40)),), "Wav2Vec2BertModel", "Wav2Vec2BertConfig", **TINY,
        feature_projection_input_dim=40, conv_depthwise_kernel_size=7),
    Entry("transformers/whisper_encoder", "speech", _whisper_encoder, (Input((80, 100)),)),
    entry("audio_spectrogram", "speech", (Input((64, 32)),), "ASTForAudioClassification", "ASTConfig", **TINY, patch_size=8,
        frequency_stride=8, time_stride=8, max_length=64, num_mel_bins=32),
    Entry("transformers/encodec", "speech", _Codec, (Input((1, 640)),)),
    Entry("transformers/hifigan", "speech", _Vits, (Input((20, 40)),)),
    # time series
    entry("patchtst", "dense", (Input((32, 3)),), "PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=3, context_length=32,
        patch_length=8, patch_stride=8, prediction_length=8, num_hidden_layers=2, d_model=32, num_attention_heads=4, ffn_dim=64),
    entry("patchtsmixer", "dense", (Input((32, 3)),), "PatchTSMixerForPrediction", "PatchTSMixerConfig", num_input_channels=3,
        context_length=32, patch_length=8, patch_stride=8, prediction_length=8, num_layers=2, d_model=32),
)  # fmt: skip
