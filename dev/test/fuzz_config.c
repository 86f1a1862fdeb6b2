// config.json from anyone: never a crash, and a Config that is accepted can be laid out, written and read again
#include "llmc/config.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Error err;
    Config c, again;
    if (!config_parse(&c, (const char*)data, size, &err)) return 0;
    require(c.C > 0 && c.L > 0 && c.F > 0 && c.V > 0 && c.context > 0 && c.NKV > 0 && c.HD > 0, "sizes are positive");
    require(c.NH % c.NKV == 0 && c.HD % 2 == 0 && config_qkv(&c) > 0, "heads fit");
    require(c.eps > 0 && c.theta > 0 && c.factor >= 1 && c.low < c.high && c.original > 0,
            "RoPE and RMSNorm make sense");
    require(c.bos >= -1 && c.bos < c.V && c.n_eos <= MAX_EOS, "ids are in the vocabulary");

    Params p;
    p.layer = (LayerParams*)allocate((size_t)c.L, sizeof *p.layer);
    Param* list = (Param*)allocate((size_t)llama3_count(&c), sizeof *list);
    llama3_list(list, &p, &c);
    require(llama3_place(list, llama3_count(&c), DTYPE_F32, NULL) < (size_t)1 << 52,
            "the bytes of a model can be counted");
    free(list), free(p.layer);

    cJSON* root = config_tree(&c, DTYPE_F32);
    char* text = cJSON_Print(root);
    require(config_parse(&again, text, strlen(text), &err), "what is written can be read");
    require(c.eps == again.eps && c.theta == again.theta && c.factor == again.factor && c.HD == again.HD &&
                c.bos == again.bos && c.n_eos == again.n_eos && c.tied == again.tied,
            "and says the same");
    if (c.factor != 1)
        require(c.low == again.low && c.high == again.high && c.original == again.original, "also of the scaling");
    cJSON_Delete(root);
    free(text);
    return 0;
}
